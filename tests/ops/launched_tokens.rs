//! Launches from ids to ids, which a step has before its layers and after them.

use crate::cases::{Random, floats, values};
use crate::devices::gpu;
use candle_core::{DType, Device, Result, Tensor};
use candle_fp8::{LaunchArgmax, Launches};

fn random(shape: &[usize], dtype: DType, seed: u64, device: &Device) -> Result<Tensor> {
    let mut random = Random(seed);
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| random.signed() * 2.0)
        .collect();
    floats(&values, shape, dtype, device)
}

/// As Candle folds: the first of the largest.
fn largest(logits: &[f64]) -> u32 {
    let mut at = 0;
    for (i, logit) in logits.iter().enumerate() {
        if logits[at] < *logit {
            at = i;
        }
    }
    at as u32
}

/// Memory that a list goes round in.
struct Loop {
    /// `[B + 1]`: ids, and whether a logit was not finite.
    words: Tensor,
    positions: Tensor,
    embedded: Tensor,
    logits: Tensor,
    plain: Launches,
    greedy: Launches,
}

impl Loop {
    fn new(batch: usize, table: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        let device = table.device();
        let (vocab, dim) = weight.dims2()?;
        let words = Tensor::zeros(batch + 1, DType::U32, device)?;
        let positions = Tensor::zeros(batch, DType::U32, device)?;
        let ids = words.narrow(0, 0, batch)?;
        let mut plain = Launches::new(device)?;
        let embedded = plain.values(batch, dim, weight.dtype())?;
        let logits = plain.values(batch, vocab, weight.dtype())?;
        plain.embed(table, &ids, &embedded)?;
        assert!(plain.dense_mm(&embedded, weight, bias, &logits)?);
        let mut greedy = plain.fork();
        let to = LaunchArgmax {
            ids: &ids,
            positions: &positions,
            not_finite: &words.narrow(0, batch, 1)?,
        };
        greedy.argmax(&logits, to)?;
        assert_eq!((plain.len(), greedy.len()), (2, 3));
        // It has moved positions on.
        assert!(greedy.embed(table, &ids, &embedded).is_err());
        Ok(Self {
            words,
            positions,
            embedded,
            logits,
            plain,
            greedy,
        })
    }

    /// Ids and flag.
    fn words(&self) -> Result<(Vec<u32>, u32)> {
        let mut words = self.words.to_vec1::<u32>()?;
        let flag = words.pop().expect("a flag");
        Ok((words, flag))
    }
}

#[test]
fn ids_go_round() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    for (dtype, table_dtype) in [
        (DType::BF16, DType::BF16),
        (DType::BF16, DType::F32),
        (DType::F16, DType::F16),
    ] {
        for (batch, vocab, dim) in [(1, 300, 512), (3, 9001, 64), (8, 517, 264), (16, 4100, 128)] {
            for with_bias in [false, true] {
                let what = format!("{dtype:?} {batch} {vocab} {dim} {with_bias}");
                let table = random(&[vocab, dim], table_dtype, 1, &device)?;
                let weight = random(&[vocab, dim], dtype, 2, &device)?;
                let bias = random(&[vocab], dtype, 3, &device)?;
                let mut ring = Loop::new(batch, &table, &weight, with_bias.then_some(&bias))?;
                let mut ids: Vec<u32> = (0..batch as u32).map(|i| i * 7 % vocab as u32).collect();
                ring.words
                    .slice_set(&Tensor::new(&ids[..], &device)?, 0, 0)?;
                for run in 0..6u32 {
                    // What does not choose leaves everything where it is.
                    if run % 3 == 1 {
                        ring.plain.run()?;
                        assert_eq!(ring.words()?, (ids.clone(), 0), "{what}, run {run}");
                    }
                    ring.greedy.run()?;
                    let rows = Tensor::new(&ids[..], &device)?;
                    let rows = table.index_select(&rows, 0)?.to_dtype(dtype)?;
                    assert_eq!(values(&ring.embedded)?, values(&rows)?, "{what}, run {run}");
                    let wide = |x: &Tensor| x.to_dtype(DType::F32);
                    let mut expected = wide(&rows)?.matmul(&wide(&weight)?.t()?)?;
                    if with_bias {
                        expected = expected.broadcast_add(&wide(&bias)?)?;
                    }
                    let (found, expected) = (values(&ring.logits)?, values(&expected)?);
                    let most = expected.iter().fold(0f64, |most, x| most.max(x.abs()));
                    for (a, b) in found.iter().zip(&expected) {
                        assert!((a - b).abs() <= 0.005 * most, "{what}, run {run}: {a} {b}");
                    }
                    ids = found.chunks(vocab).map(largest).collect();
                    assert_eq!(ring.words()?, (ids.clone(), 0), "{what}, run {run}");
                    let positions = ring.positions.to_vec1::<u32>()?;
                    assert_eq!(positions, vec![run + 1; batch], "{what}, run {run}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn an_id_without_a_row_is_noticed() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let table = random(&[100, 64], DType::BF16, 1, &device)?;
    let mut ring = Loop::new(2, &table, &table, None)?;
    // Launched one by one, and replayed.
    for _ in 0..2 {
        ring.words
            .slice_set(&Tensor::new(&[5u32, 100, 0], &device)?, 0, 0)?;
        ring.greedy.run()?;
        let embedded = values(&ring.embedded)?;
        assert!(embedded[..64].iter().all(|x| x.is_finite()));
        assert!(embedded[64..].iter().all(|x| x.is_nan()));
        assert_eq!(ring.words()?.1, 1);
        // It stays until the host clears it.
        ring.words
            .slice_set(&Tensor::new(&[5u32, 6], &device)?, 0, 0)?;
        ring.greedy.run()?;
        assert_eq!(ring.words()?.1, 1);
    }
    Ok(())
}

#[test]
fn what_no_kernel_multiplies_is_said() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let of = |m: usize, k: usize, x: DType, weight: DType| -> Result<bool> {
        let mut list = Launches::new(&device)?;
        let x = list.values(m, k, x)?;
        let weight = random(&[40, k], weight, 1, &device)?;
        let out = list.values(m, 40, x.dtype())?;
        let launched = list.dense_mm(&x, &weight, None, &out)?;
        assert_eq!(list.len(), usize::from(launched));
        Ok(launched)
    };
    assert!(of(16, 64, DType::BF16, DType::BF16)?);
    assert!(!of(17, 64, DType::BF16, DType::BF16)?);
    assert!(!of(1, 60, DType::BF16, DType::BF16)?);
    assert!(!of(1, 64, DType::F16, DType::BF16)?);
    assert!(!of(1, 64, DType::F32, DType::F32)?);
    Ok(())
}
