//! Which target matches which module. Each case was run through compressed-tensors 0.19.0 on Python 3.11
//! (`match_targets`, `is_match`, `apply_quantization_config`) and agrees with it.

use compressed_tensors::{Error, QuantizationConfig};
use serde_json::{Value, json};

/// One group for each target list, named by its position, so that the winner can be told.
fn groups(targets: &[&[&str]], ignore: &[&str]) -> Result<QuantizationConfig, Error> {
    let groups: serde_json::Map<String, Value> = targets
        .iter()
        .enumerate()
        .map(|(index, targets)| {
            (
                format!("{index}"),
                json!({ "targets": targets, "weights": { "type": "float" } }),
            )
        })
        .collect();
    let config = json!({ "quantization_config": { "config_groups": groups, "ignore": ignore } });
    QuantizationConfig::from_model_config(&config).map(|found| found.expect("quantized"))
}

/// The group that wins; each target is its own group.
#[track_caller]
fn winner<'t>(targets: &[&'t str], module: &str, class: &str) -> Option<&'t str> {
    let lists: Vec<&[&str]> = targets.iter().map(std::slice::from_ref).collect();
    let quantization = groups(&lists, &[]).expect("the targets compile");
    let scheme = quantization.scheme(module, class)?;
    Some(targets[scheme.group.parse::<usize>().expect("a number")])
}

fn matches(target: &str, module: &str) -> bool {
    winner(&[target], module, "Linear").is_some()
}

#[test]
fn exact_names_then_patterns_then_classes() {
    let gate = "model.layers.0.mlp.gate_proj";
    let mut targets = vec![
        "Linear",
        "re:.*mlp.gate",
        gate,
        "re:.*gate_proj$",
        "re:.*",
        "Module",
    ];
    // Each winner is taken away to see the next: upstream's order of these six.
    for expected in [
        gate,
        "re:.*",
        "re:.*gate_proj$",
        "re:.*mlp.gate",
        "Linear",
        "Module",
    ] {
        assert_eq!(winner(&targets, gate, "Linear"), Some(expected));
        targets.retain(|target| *target != expected);
    }
}

#[test]
fn classes_are_sorted_too() {
    assert_eq!(winner(&["Module", "MyAttn"], "x", "MyAttn"), Some("Module"));
    assert_eq!(
        winner(&["Module", "Linear", "A"], "x", "Linear"),
        Some("Linear")
    );
    assert_eq!(winner(&["Embedding"], "x", "Linear"), None);
    assert_eq!(winner(&["Embedding"], "x", "Embedding"), Some("Embedding"));
}

#[test]
fn patterns_are_anchored_at_the_start_only() {
    assert!(matches("re:.*mlp.gate", "model.layers.0.mlp.gate_proj"));
    assert!(!matches("re:lm_head", "model.lm_head"));
    assert!(matches("re:lm_head", "lm_head"));
    assert!(matches("re:lm_head", "lm_head_extra"));
    assert!(!matches("re:lm_head$", "lm_head_extra"));
    assert!(matches("re:model\\.layers\\.1", "model.layers.10.x"));
    assert!(!matches("re:model.layers.(1|2)\\b", "model.layers.10.x"));
    assert!(!matches("re:layers\\.1", "model.layers.10.x"));
    // A later match must not hide that there is none at the start, whatever the alternation's order.
    assert!(matches("re:b|a", "ab"));
    assert!(!matches("re:b|c", "ab"));
    assert!(matches("re:(?:a|ab)c", "abc"));
    // The empty pattern matches everything.
    assert!(matches("re:", "anything"));
    assert!(matches("re:(?i)MODEL.*", "model.x"));
    assert!(!matches("re:MODEL", "model.x"));
}

#[test]
fn plain_targets_are_whole_names() {
    for target in [
        "model",
        "down_proj",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.mlp.down",
        ".*",
        "",
    ] {
        assert!(!matches(target, "model.layers.0.mlp.down_proj"), "{target}");
    }
}

#[test]
fn python_spellings() {
    // Braces that are no quantifier, open lower bounds, brackets and set operators in classes, \Z.
    let cases = [
        ("a{", "a{", true),
        ("{x}", "{x}", true),
        ("a{}", "a{}", true),
        ("a{,2}$", "aa", true),
        ("a{,2}$", "aaa", false),
        ("a{,}b", "aab", true),
        ("[[]a", "[a", true),
        ("[a&&b]", "&", true),
        ("[a~~b]", "~", true),
        ("[]a]", "]", true),
        ("[^]]", "]", false),
        ("a\\Z", "a", true),
        ("a\\Z", "ab", false),
        ("\\w+$", "é", true),
        ("(?x) a b # c", "ab", true),
        ("(?P<layer>\\d+)\\.x", "12.x", true),
        ("a*?b", "aab", true),
        ("\\<a", "a", false),
    ];
    for (pattern, module, expected) in cases {
        assert_eq!(
            matches(&format!("re:{pattern}"), module),
            expected,
            "{pattern} on {module}"
        );
    }
}

#[test]
fn the_later_group_owns_a_shared_target() {
    let quantization = groups(&[&["Linear", "re:q"], &["Linear"]], &[]).expect("compiles");
    let group = |module: &str| {
        quantization
            .scheme(module, "Linear")
            .map(|scheme| scheme.group.clone())
    };
    assert_eq!(group("down").as_deref(), Some("1"));
    assert_eq!(group("q").as_deref(), Some("0"));
    let quantization = groups(&[&["re:gate"], &["re:g"], &["Linear"]], &[]).expect("compiles");
    let group = |module: &str| {
        quantization
            .scheme(module, "Linear")
            .map(|scheme| scheme.group.clone())
    };
    assert_eq!(
        group("gate_proj").as_deref(),
        Some("1"),
        "re:g sorts before re:gate"
    );
    assert_eq!(group("q").as_deref(), Some("2"));
}

#[test]
fn ignore_follows_the_same_rules_and_wins() {
    let ignored = |ignore: &str, module: &str| {
        let quantization = groups(&[&["re:.*", "a.b", "Linear"]], &[ignore]).expect("compiles");
        let ignored = quantization.is_ignored(module, "Linear");
        assert_eq!(quantization.scheme(module, "Linear").is_none(), ignored);
        ignored
    };
    assert!(ignored("a.b", "a.b"));
    assert!(ignored("re:a", "a.b"));
    assert!(ignored("Linear", "a.b"));
    assert!(ignored("Module", "a.b"));
    assert!(!ignored("b", "a.b"));
    assert!(!ignored("a", "a.b"));
    assert!(!ignored("re:b", "a.b"));
    assert!(!ignored("Embedding", "a.b"));
    assert!(!ignored("lm_head", "model.lm_head"));
}

#[test]
fn targets_which_match_nothing() {
    let targets: &[&[&str]] = &[
        &["Linear", "re:.*k_proj", "re:nothing"],
        &["model.q_proj", "model.x", "re:nothing"],
    ];
    let quantization = groups(targets, &["re:.*k_proj"]).expect("compiles");
    let modules = [("model.q_proj", "Linear"), ("model.k_proj", "Linear")];
    // Ignored modules count as matched, and so do those that another target wins.
    assert_eq!(
        quantization.unmatched_targets(modules.into_iter()),
        ["re:nothing", "model.x"]
    );
    assert_eq!(quantization.unmatched_targets(std::iter::empty()).len(), 5);
}

#[test]
fn patterns_which_cannot_be_used() {
    let cases = [
        ("re:model.(layers", "unclosed group"),
        ("re:a|b)(c", "unopened group"),
        ("re:^(?!.*visual).*", "lookaround"),
        ("re:.*(?<=mlp)\\.gate", "lookaround"),
        ("re:(a)\\1", "backreference"),
        ("re:(?P<a>a)(?P=a)", "backreference"),
        ("re:.*+x", "quantifier"),
        ("re:a**", "quantifier"),
        ("re:a{2}{3}", "quantifier"),
        ("re:a*??", "quantifier"),
        ("re:[a--b]", "character class"),
        ("re:[a-", "unclosed"),
        ("re:\\", "escape"),
    ];
    for (target, reason) in cases {
        for (targets, ignore) in [(vec![target], vec![]), (vec!["Linear"], vec![target])] {
            let error = groups(&[&targets], &ignore).expect_err(target);
            let Error::Pattern { pattern, path, .. } = &error else {
                panic!("{target}: {error:?}")
            };
            assert_eq!(format!("re:{pattern}"), target);
            assert!(path.starts_with("quantization_config."), "{path}");
            assert!(error.to_string().contains(reason), "{error}");
            assert!(error.to_string().contains(pattern.as_str()), "{error}");
        }
    }
}

#[test]
fn patterns_which_blow_up() {
    for pattern in ["(?:a{1000}){1000}", "(?:(?:\\w{100}){100}){100}"] {
        let target = format!("re:{pattern}");
        let error = groups(&[&[&target]], &[]).expect_err("too big");
        assert!(
            matches!(&error, Error::PatternTooBig { pattern: found, .. } if found == pattern),
            "{error:?}"
        );
        assert!(error.to_string().contains(pattern), "{error}");
    }
    // Nesting is bounded too, and matching is linear: no catastrophic backtracking.
    let nested = format!("re:{}{}", "(".repeat(10_000), ")".repeat(10_000));
    assert!(matches!(
        groups(&[&[&nested]], &[]),
        Err(Error::Pattern { .. })
    ));
    assert!(!matches("re:(a+)+$", &format!("{}b", "a".repeat(50_000))));
}
