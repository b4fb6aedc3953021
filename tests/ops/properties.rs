//! `scaled_mm` at random shapes, strategies and dtypes against the oracle.

use crate::cases::Case;
use crate::devices::gpu;
use crate::oracle::{Float, Layout, Mode};
use candle_core::Device;
use proptest::prelude::*;

fn layouts() -> impl Strategy<Value = Layout> {
    prop_oneof![
        Just(Layout::Tensor),
        Just(Layout::Channel),
        (1usize..40, 1usize..70).prop_map(|(rows, cols)| Layout::Block(rows, cols)),
    ]
}

fn modes() -> impl Strategy<Value = Mode> {
    prop_oneof![
        Just(Mode::Full),
        Just(Mode::Token),
        Just(Mode::Tensor),
        (1u32..1000).prop_map(|n| Mode::Static(n as f32 / 8192.0)),
        (1usize..90).prop_map(Mode::Group),
    ]
}

fn cases() -> impl Strategy<Value = Case> {
    let floats = prop_oneof![Just(Float::Bf16), Just(Float::F16), Just(Float::F32)];
    (
        prop::collection::vec(0usize..5, 0..3),
        1usize..70,
        1usize..150,
        layouts(),
        modes(),
        floats,
        any::<bool>(),
        any::<u64>(),
    )
        .prop_map(|(lead, n, k, layout, mode, float, bias, seed)| Case {
            lead,
            n,
            k,
            layout,
            mode,
            float,
            bias,
            seed,
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn scaled_mm_agrees_with_the_oracle(case in cases()) {
        let data = case.data();
        let expected = case.expected(&data);
        for device in [Some(Device::Cpu), gpu()].into_iter().flatten() {
            let y = case.run(&data, &device).map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert_eq!(case.check(&y, &expected), Ok(()));
        }
    }
}
