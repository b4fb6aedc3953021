//! Rows of activations, and what kernels make of them, compared with what the CPU does.

use candle_kernels_fp8::cuda::{
    self, Dequantize, Error, Float, Output, Quantization, Quantize, Residual, RmsNorm, SiluMul,
};
use candle_kernels_fp8::{ScaleLayout, cpu, e4m3};
use half::bf16;
use half::slice::HalfFloatSliceExt;

use crate::device::{Buffer, Device, Failed};
use crate::producers::Producer;
use crate::random::Random;

const EPS: f32 = 1e-5;

/// Activations `[m, k]` on both sides.
pub(crate) struct Tokens<'a> {
    device: &'a Device,
    m: usize,
    k: usize,
    x: Vec<bf16>,
    /// The residual, or what is multiplied with SiLU.
    other: Vec<bf16>,
    codes: Vec<u8>,
    /// Of `codes`, one for each row, as BF16 holds them.
    scales: Vec<f32>,
    /// Of the norm.
    weight: Vec<bf16>,
    device_scales: Buffer<f32>,
    device_weight: Buffer<u16>,
    copies: Vec<Memory>,
}

/// Memory of one launch.
struct Memory {
    x: Buffer<u16>,
    other: Buffer<u16>,
    codes: Buffer<u8>,
    sums_out: Buffer<u16>,
    values_out: Buffer<u16>,
    codes_out: Buffer<u8>,
    /// Room for a scale of each 128 neighbours.
    scales_out: Buffer<f32>,
}

impl<'a> Tokens<'a> {
    pub(crate) fn new(
        device: &'a Device,
        (m, k): (usize, usize),
        copies: usize,
    ) -> Result<Self, Failed> {
        let mut random = Random::new((m * k) as u64);
        let x = random.values(m * k);
        let other = random.values(m * k);
        let codes = random.codes(m * k);
        let round = |scale: f32| bf16::from_f32(scale).to_f32();
        let scales: Vec<f32> = random.scales(m).into_iter().map(round).collect();
        let weight = random.values(k);
        let first = (
            device.upload(x.reinterpret_cast())?,
            device.upload(other.reinterpret_cast())?,
            device.upload(&codes)?,
        );
        let copy = |_| {
            Ok(Memory {
                x: device.copy(&first.0)?,
                other: device.copy(&first.1)?,
                codes: device.copy(&first.2)?,
                sums_out: device.room(m * k)?,
                values_out: device.room(m * k)?,
                codes_out: device.room(m * k)?,
                scales_out: device.room(m * k.div_ceil(128))?,
            })
        };
        Ok(Self {
            device,
            m,
            k,
            device_scales: device.upload(&scales)?,
            device_weight: device.upload(weight.reinterpret_cast())?,
            copies: (0..copies).map(copy).collect::<Result<_, Failed>>()?,
            x,
            other,
            codes,
            scales,
            weight,
        })
    }

    pub(crate) fn launch(
        &self,
        producer: Producer,
        copy: usize,
        dependent: bool,
    ) -> Result<(), Error> {
        let &Self { m, k, .. } = self;
        let stream = &self.device.stream;
        let copy = &self.copies[copy];
        let scales = copy.scales_out.address;
        let out = |fused| match fused {
            true => Output::Codes {
                codes: copy.codes_out.address,
                stride: k,
                quantization: Quantization::Token { scales },
            },
            false => Output::Values {
                values: copy.values_out.address,
                stride: k,
            },
        };
        let float = Float::Bf16;
        // SAFETY: the memory is as large as the sizes say and lives until the stream is synchronized; what is read, the
        // host wrote before the first launch.
        unsafe {
            match producer {
                Producer::Norm { add, fused } => {
                    let residual = Residual {
                        values: copy.other.address,
                        stride: k,
                        sum: copy.sums_out.address,
                        sum_stride: k,
                    };
                    let norm = RmsNorm {
                        m,
                        k,
                        x: copy.x.address,
                        row_stride: k,
                        residual: add.then_some(residual),
                        weight: self.device_weight.address,
                        eps: EPS,
                        float,
                        out: out(fused),
                        dependent,
                    };
                    cuda::rms_norm(stream, &norm)
                }
                Producer::SiluMul { fused } => {
                    let silu_mul = SiluMul {
                        m,
                        k,
                        gate: copy.x.address,
                        gate_stride: k,
                        up: copy.other.address,
                        up_stride: k,
                        float,
                        out: out(fused),
                        dependent,
                    };
                    cuda::silu_mul(stream, &silu_mul)
                }
                Producer::Quantize { group } => {
                    let quantize = Quantize {
                        m,
                        k,
                        x: copy.x.address,
                        float,
                        row_stride: k,
                        codes: copy.codes_out.address,
                        codes_stride: k,
                        quantization: match group {
                            Some(group) => Quantization::Group { group, scales },
                            None => Quantization::Token { scales },
                        },
                        dependent,
                    };
                    cuda::quantize(stream, &quantize)
                }
                Producer::Encode => {
                    let (x, codes) = (copy.x.address, copy.codes_out.address);
                    cuda::cast_to_e4m3(stream, (x, float), codes, m * k, dependent)
                }
                Producer::Decode => {
                    let (codes, values) = (copy.codes.address, copy.values_out.address);
                    cuda::cast_from_e4m3(stream, codes, (values, float), m * k, dependent)
                }
                Producer::Dequantize => {
                    let dequantize = Dequantize {
                        n: m,
                        k,
                        codes: copy.codes.address,
                        codes_stride: k,
                        scales: self.device_scales.address,
                        layout: ScaleLayout::Channel,
                        scale_float: float,
                        out: copy.values_out.address,
                        out_float: float,
                        dependent,
                    };
                    cuda::dequantize(stream, &dequantize)
                }
            }
        }
    }

    /// Compares some rows with what the CPU makes of them. What is fused must quantize what it writes alone.
    pub(crate) fn check(&self, producer: Producer, dependent: bool) -> Result<(), Failed> {
        let (device, copy) = (self.device, &self.copies[0]);
        device.poison(&copy.values_out)?;
        if let Some(alone) = producer.alone() {
            self.launch(alone, 0, dependent)?;
        }
        device.poison(&copy.sums_out)?;
        device.poison(&copy.codes_out)?;
        device.poison(&copy.scales_out)?;
        self.launch(producer, 0, dependent)?;
        let m = self.m;
        let mut rows = vec![0, m / 3, m / 2, m - m.div_ceil(4), m - 1];
        rows.dedup();
        for row in rows {
            self.check_row(producer, row)
                .map_err(|error| format!("row {row}: {error}"))?;
        }
        Ok(())
    }

    fn check_row(&self, producer: Producer, row: usize) -> Result<(), Failed> {
        let (device, k, copy) = (self.device, self.k, &self.copies[0]);
        let set = cpu::InstructionSet::best();
        let at = row * k..(row + 1) * k;
        let (x, other) = (&self.x[at.clone()], &self.other[at.clone()]);
        let codes = &self.codes[at.clone()];
        let values = |of: &Buffer<u16>| -> Result<Vec<bf16>, Failed> {
            let bits = device.download_part(of, at.clone())?;
            Ok(bits.into_iter().map(bf16::from_bits).collect())
        };
        let mut expected = Vec::new();
        match producer {
            Producer::Norm { fused: true, add } => {
                if add {
                    same_values(&values(&copy.sums_out)?, &sums(x, other))?;
                }
                self.check_codes(row, &values(&copy.values_out)?, k)
            }
            Producer::SiluMul { fused: true } => {
                self.check_codes(row, &values(&copy.values_out)?, k)
            }
            Producer::Norm { add: false, .. } => {
                cpu::rms_norm(set, k, x, &self.weight, EPS, &mut expected);
                near(&values(&copy.values_out)?, &expected)
            }
            Producer::Norm { add: true, .. } => {
                same_values(&values(&copy.sums_out)?, &sums(x, other))?;
                cpu::rms_norm(set, k, &sums(x, other), &self.weight, EPS, &mut expected);
                near(&values(&copy.values_out)?, &expected)
            }
            Producer::SiluMul { .. } => {
                cpu::silu_mul(set, x, other, &mut expected);
                near(&values(&copy.values_out)?, &expected)
            }
            Producer::Quantize { group } => self.check_codes(row, x, group.unwrap_or(k)),
            Producer::Encode => {
                let found = device.download_part(&copy.codes_out, at.clone())?;
                let expected: Vec<u8> = x.iter().map(|x| e4m3::encode(x.to_f32())).collect();
                same(&found, &expected, "code")
            }
            Producer::Decode => {
                let value = |&code: &u8| bf16::from_f32(e4m3::decode(code));
                expected.extend(codes.iter().map(value));
                same_values(&values(&copy.values_out)?, &expected)
            }
            Producer::Dequantize => {
                expected.resize(k, bf16::ZERO);
                let scales = &self.scales[row..=row];
                cpu::dequantize::<bf16, _>(codes, k, scales, ScaleLayout::Channel, &mut expected);
                same_values(&values(&copy.values_out)?, &expected)
            }
        }
    }

    /// That a row's codes and scales are those of `x`.
    fn check_codes(&self, row: usize, x: &[bf16], group: usize) -> Result<(), Failed> {
        let (device, k, copy) = (self.device, self.k, &self.copies[0]);
        let x: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
        let groups = k.div_ceil(group);
        let (mut codes, mut scales) = (vec![0; k], vec![0.0; groups]);
        cpu::quantize_groups(&x, k, group, &mut codes, &mut scales);
        let found = device.download_part(&copy.scales_out, row * groups..(row + 1) * groups)?;
        same(&found, &scales, "scale")?;
        let found = device.download_part(&copy.codes_out, row * k..(row + 1) * k)?;
        same(&found, &codes, "code")
    }
}

fn sums(x: &[bf16], residual: &[bf16]) -> Vec<bf16> {
    let sum = |(x, residual): (&bf16, &bf16)| bf16::from_f32(x.to_f32() + residual.to_f32());
    x.iter().zip(residual).map(sum).collect()
}

fn same_values(found: &[bf16], expected: &[bf16]) -> Result<(), Failed> {
    same(found, expected, "value")
}

/// NaN, as which outputs are poisoned, is never the same; no input makes a kernel write it.
fn same<T: PartialEq + std::fmt::Debug>(
    found: &[T],
    expected: &[T],
    what: &str,
) -> Result<(), Failed> {
    let mut pairs = found.iter().zip(expected);
    match pairs.position(|(found, expected)| found != expected) {
        Some(i) => Err(format!("{what} {i} is {:?}, not {:?}", found[i], expected[i]).into()),
        None => Ok(()),
    }
}

/// That values differ by roundings that tipped over, which few do: sums are added in another order than the CPU's, and
/// exponentials differ in their last bits.
fn near(found: &[bf16], expected: &[bf16]) -> Result<(), Failed> {
    let mut different = 0;
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let (found, expected) = (found.to_f32(), expected.to_f32());
        // A step of the type for what is rounded first, which the weight multiplies, and half of one for each result.
        let bound = expected.abs() * 2f32.powi(-6);
        if found.is_nan() || (found - expected).abs() > bound {
            return Err(format!("value {i} is {found:e}, not {expected:e} ± {bound:e}").into());
        }
        different += usize::from(found != expected);
    }
    match different * 200 > found.len() {
        true => Err(format!(
            "{different} of {} values are rounded otherwise",
            found.len()
        )
        .into()),
        false => Ok(()),
    }
}
