//! Frequencies against numbers worked out in f64 from the published formulas.

use candle_core::{DType, Device};
use candle_fp8_transformers::{RopeConfig, RopeScaling, RotaryEmbedding};

fn close(scaling: RopeScaling, theta: f64, expected: &[(usize, f64)]) -> RotaryEmbedding {
    let rotary = RotaryEmbedding::new(&RopeConfig { theta, scaling }, 128);
    assert_eq!(rotary.inv_freq().len(), 64);
    for &(i, value) in expected {
        let found = rotary.inv_freq()[i] as f64;
        // f32 pow and three more operations.
        assert!(
            (found / value - 1.0).abs() < 2e-6,
            "pair {i}: {found} instead of {value}"
        );
    }
    rotary
}

#[test]
fn llama3() {
    // The values of Llama 3.1: pairs up to 28 are kept, those from 35 on divided by 8.
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let expected = [
        (0, 1.0),
        (1, 0.8146172338565447),
        (20, 0.016560440080994446),
        (28, 0.003211445994752591),
        (29, 0.002166570763503359),
        (30, 0.0013718935677611381),
        (31, 0.0008567514129196321),
        (32, 0.0005248461609929547),
        (33, 0.00031269375038406517),
        (34, 0.0001785078127679964),
        (35, 9.556212353964683e-05),
        (40, 3.428102195952591e-05),
        (63, 3.068925988914511e-07),
    ];
    close(scaling, 500000.0, &expected);
}

#[test]
fn yarn() {
    // Qwen2.5 stretched four times: the passage runs over pairs 23 to 40.
    let scaling = |truncate| RopeScaling::Yarn {
        factor: 4.0,
        original_max_position_embeddings: 32768,
        attention_factor: 1.138629436111989,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate,
    };
    let expected = [
        (0, 1.0),
        (20, 0.01333521432163324),
        (23, 0.006978305848598663),
        (24, 0.005375321490790102),
        (30, 0.001064360981247002),
        (35, 0.0002462584069089387),
        (39, 6.490394320837029e-05),
        (40, 4.445698525097307e-05),
        (41, 3.582531425592407e-05),
        (63, 3.102344401879299e-07),
    ];
    let rotary = close(scaling(true), 1e6, &expected);
    let exact = [
        (24, 0.0055172704751341225),
        (30, 0.0010792377416765538),
        (39, 6.187806812450695e-05),
    ];
    close(scaling(false), 1e6, &exact);

    // The attention factor multiplies cos and sin.
    let (cos, _) = rotary.cos_sin(0, 1, DType::F32, &Device::Cpu).unwrap();
    assert_eq!(cos.to_vec2::<f32>().unwrap(), [[1.1386294f32; 64]]);
}

#[test]
fn linear_and_default() {
    close(
        RopeScaling::Linear { factor: 4.0 },
        10000.0,
        &[(0, 0.25), (32, 0.0025)],
    );
    let rotary = close(
        RopeScaling::Default,
        10000.0,
        &[(0, 1.0), (16, 0.1), (48, 0.001)],
    );

    let (cos, sin) = rotary.cos_sin(5, 2, DType::F32, &Device::Cpu).unwrap();
    assert_eq!((cos.dims(), sin.dims()), (&[2, 64][..], &[2, 64][..]));
    let (cos, sin) = (cos.to_vec2::<f32>().unwrap(), sin.to_vec2::<f32>().unwrap());
    for (row, position) in [(0, 5.0f64), (1, 6.0)] {
        for (i, frequency) in [(0, 1.0), (16, 0.1), (48, 0.001)] {
            let angle = position * frequency;
            assert!((cos[row][i] as f64 - angle.cos()).abs() < 1e-6);
            assert!((sin[row][i] as f64 - angle.sin()).abs() < 1e-6);
        }
    }
}
