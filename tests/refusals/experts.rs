//! Experts that cannot be merged.

use candle_compressed_tensors::Error;
use safetensors::Dtype;
use serde_json::json;

use crate::{assert_refused, problems, support::changed};

const EXPERTS: &str = "model.layers.0.mlp.experts";

#[test]
fn a_missing_expert() {
    // The last one, and one in between.
    for expert in [3, 1] {
        let name = format!("refusals-expert-{expert}");
        let dir = changed("qwen3-moe-channel", &name, |tensors, _| {
            tensors.retain(|name, _| !name.contains(&format!(".experts.{expert}.")));
        });
        assert_refused!(
            dir,
            Error::Experts { .. },
            format!(
                "{EXPERTS}: \"{expert}.gate_proj.weight\" is not in the checkpoint (4 experts expected)"
            )
        );
        // The down projections miss it too.
        assert_eq!(problems(&dir).len(), 2);
    }
    let dir = changed("mixtral-channel", "refusals-expert-w3", |tensors, _| {
        tensors.retain(|name, _| !name.contains(".experts.1.w3."));
    });
    let experts = "model.layers.0.block_sparse_moe.experts";
    let text = problems(&dir).join("\n");
    assert!(
        text.starts_with(&format!(
            "{experts}: \"1.w3.weight\" is not in the checkpoint"
        )),
        "{text}"
    );
}

#[test]
fn an_expert_without_its_scale() {
    let dir = changed(
        "qwen3-moe-channel",
        "refusals-expert-scale",
        |tensors, _| {
            tensors
                .remove(&format!("{EXPERTS}.2.up_proj.weight_scale"))
                .unwrap();
        },
    );
    assert_refused!(
        dir,
        Error::MissingScale { .. },
        format!(
            "{EXPERTS}.2.up_proj.weight: stored as F8_E4M3 (channel), but \"{EXPERTS}.2.up_proj.weight_scale\" is not \
             in the checkpoint"
        )
    );
}

#[test]
fn more_and_fewer_experts_than_the_config_says() {
    for (name, count, text) in [
        (
            "experts-3",
            json!(3),
            "expert 3 is stored, but there should be 3 experts",
        ),
        (
            "experts-0",
            json!(0),
            "expert 3 is stored, but there should be 0 experts",
        ),
        (
            "experts-5",
            json!(5),
            "\"4.gate_proj.weight\" is not in the checkpoint (5 experts expected)",
        ),
        (
            "experts-2-60",
            json!(1u64 << 60),
            "\"4.gate_proj.weight\" is not in the checkpoint (1152921504606846976 experts expected)",
        ),
    ] {
        let dir = changed(
            "qwen3-moe-channel",
            &format!("refusals-{name}"),
            |_, config| {
                config["num_experts"] = count;
            },
        );
        assert_refused!(dir, Error::Experts { .. }, format!("{EXPERTS}: {text}"));
    }
    // Without a count, the experts that are there must be the first ones.
    let dir = changed(
        "qwen3-moe-channel",
        "refusals-experts-gap",
        |tensors, config| {
            config.as_object_mut().unwrap().remove("num_experts");
            tensors.retain(|name, _| !name.contains(".experts.1."));
        },
    );
    assert_refused!(
        dir,
        Error::Experts { .. },
        format!("{EXPERTS}: expert 3 is stored, but there should be 3 experts")
    );
}

#[test]
fn experts_of_different_shapes() {
    // Dense experts: nothing else is wrong with them then.
    let recast = |name: &str, projections: &[(usize, &str, [usize; 2])]| {
        changed("qwen3-moe-channel", name, |tensors, _| {
            for (expert, projection, shape) in projections {
                let weight = format!("{EXPERTS}.{expert}.{projection}.weight");
                tensors.get_mut(&weight).unwrap().recast(Dtype::BF16, shape);
                tensors.remove(&format!("{weight}_scale")).unwrap();
            }
        })
    };
    assert_refused!(
        recast("refusals-expert-down", &[(2, "down_proj", [64, 47])]),
        Error::Experts { .. },
        format!("{EXPERTS}: expert 0 has the shapes [[64, 48]], expert 2 has [[64, 47]]")
    );
    let both = [(1, "gate_proj", [40, 64]), (1, "up_proj", [40, 64])];
    assert_refused!(
        recast("refusals-expert-wide", &both),
        Error::Experts { .. },
        format!(
            "{EXPERTS}: expert 0 has the shapes [[48, 64], [48, 64]], expert 1 has [[40, 64], [40, 64]]"
        )
    );
    // As many rows in all, but the gate's are not the up projection's.
    let uneven: Vec<_> = (0..4)
        .flat_map(|expert| {
            [
                (expert, "gate_proj", [50, 64]),
                (expert, "up_proj", [46, 64]),
            ]
        })
        .collect();
    assert_refused!(
        recast("refusals-expert-uneven", &uneven),
        Error::Experts { .. },
        format!(
            "{EXPERTS}: expert 0 has [\"{EXPERTS}.0.gate_proj.weight\", \"{EXPERTS}.0.up_proj.weight\"] of shapes \
             [[50, 64], [46, 64]]; expected equal matrices"
        )
    );
}
