//! Rows of several tensors in one.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fp8::cat_rows;

use crate::devices::everywhere;

/// Its values, wherever it is.
fn read(x: &Tensor) -> Result<Vec<f32>> {
    let x = x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    x.flatten_all()?.to_vec1()
}

/// Different numbers `[rows, ..]`.
fn part(rows: usize, first: f32, dtype: DType, device: &Device) -> Result<Tensor> {
    let x = Tensor::arange(first, first + (rows * 6) as f32, &Device::Cpu)?;
    x.reshape((rows, 3, 2))?.to_dtype(dtype)?.to_device(device)
}

#[test]
fn rows_are_one_after_the_other() -> Result<()> {
    everywhere(|device| {
        for dtype in [DType::BF16, DType::F16, DType::F32, DType::F8E4M3] {
            let own = |rows, first| part(rows, first, dtype, device);
            // One that is part of another, one of no rows.
            let parts = [
                own(2, 0.)?,
                own(5, 20.)?.narrow(0, 1, 3)?,
                own(0, 0.)?,
                own(1, 60.)?,
            ];
            let expected = parts.iter().map(read).collect::<Result<Vec<_>>>()?.concat();
            let all = cat_rows(&parts)?;
            assert_eq!((all.dims(), all.dtype()), (&[6, 3, 2][..], dtype));
            assert_eq!(read(&all)?, expected, "{dtype:?}");
            assert_eq!(read(&cat_rows(&parts[1..2])?)?, read(&parts[1])?);
        }
        let x = part(4, 0., DType::F32, device)?;
        let swapped = x.transpose(1, 2)?.contiguous()?.transpose(1, 2)?;
        assert!(!swapped.is_contiguous());
        let twice = [read(&x)?, read(&x)?].concat();
        assert_eq!(read(&cat_rows(&[swapped, x])?)?, twice);
        Ok(())
    })
}

#[test]
fn parts_that_do_not_fit_are_refused() -> Result<()> {
    everywhere(|device| {
        let x = part(2, 0., DType::F32, device)?;
        for other in [
            x.narrow(1, 0, 2)?.contiguous()?,
            x.flatten_from(1)?,
            x.to_dtype(DType::F16)?,
        ] {
            assert!(cat_rows(&[x.clone(), other]).is_err());
        }
        assert!(cat_rows(&[]).is_err());
        Ok(())
    })
}

#[test]
fn gradients_pass_to_all_parts() -> Result<()> {
    everywhere(|device| {
        let [a, b] = [1, 2].map(|rows| part(rows, 0., DType::F32, device));
        let (a, b) = (Var::from_tensor(&a?)?, Var::from_tensor(&b?)?);
        let y = cat_rows(&[a.as_tensor().clone(), b.as_tensor().clone()])?;
        let gradients = y.sqr()?.sum_all()?.backward()?;
        for x in [a, b] {
            let expected: Vec<f32> = read(&x)?.iter().map(|x| 2. * x).collect();
            assert_eq!(read(gradients.get(&x).expect("a gradient"))?, expected);
        }
        Ok(())
    })
}
