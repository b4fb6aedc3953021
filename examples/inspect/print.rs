//! The report for people.

use std::fmt::Write;

use candle_fp8_examples::{Table, table::Align, units};

use super::report::{Kind, KvCache, Module, Report, Totals};

/// The whole report.
pub(crate) fn text(report: &Report) -> String {
    let mut text = head(report);
    text.push('\n');
    let _ = writeln!(text, "{}", modules(&report.modules));
    let _ = write!(text, "{}", totals(&report.totals));
    if let Some(kv_cache) = &report.kv_cache {
        let _ = writeln!(text, "\nKV cache: {}", cache(kv_cache));
    }
    for (title, lines) in [("Warnings", &report.warnings), ("Refused", &report.refused)] {
        if !lines.is_empty() {
            let _ = writeln!(text, "\n{title}:");
        }
        for line in lines {
            let _ = writeln!(text, "  {line}");
        }
    }
    text
}

fn head(report: &Report) -> String {
    let architecture = report.architecture.as_deref().unwrap_or("no known model");
    let quantization = match &report.quantization {
        None => "no quantization config".to_string(),
        Some(quantization) => {
            let mut words = quantization.quant_method.clone();
            if let Some(format) = &quantization.format {
                let _ = write!(words, ", format {format}");
            }
            if !quantization.ignore.is_empty() {
                let _ = write!(words, ", ignores {}", some_of(&quantization.ignore));
            }
            words
        }
    };
    format!("{}\n{architecture}; {quantization}\n", report.checkpoint)
}

/// The first few of a list that may be hundreds long.
fn some_of(list: &[String]) -> String {
    const MOST: usize = 4;
    let shown = list[..list.len().min(MOST)].join(", ");
    match list.len().saturating_sub(MOST) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn modules(modules: &[Module]) -> Table {
    let mut table = Table::new([
        ("module", Align::Left),
        ("group", Align::Left),
        ("weights", Align::Left),
        ("activations", Align::Left),
        ("dtype", Align::Left),
        ("shape", Align::Left),
        ("bytes", Align::Right),
    ]);
    for (name, module, count) in fold_experts(modules) {
        let word = |text: &Option<String>| text.clone().unwrap_or_default();
        let weights = match module.kind {
            Kind::Fp8 => word(&module.weights),
            Kind::Dequantized => format!("{}, dequantized", word(&module.weights)),
            Kind::Dense => "dense".to_string(),
            Kind::Refused => "refused".to_string(),
        };
        table.row([
            name,
            word(&module.group),
            weights,
            word(&module.activations),
            module.dtype.clone(),
            format!("{:?}", module.shape),
            units::count((module.bytes * count) as usize),
        ]);
    }
    table
}

/// Rows of the table: experts of a layer that are alike become one, `….experts.{0..127}.up_proj`.
fn fold_experts(modules: &[Module]) -> Vec<(String, &Module, u64)> {
    let mut rows: Vec<Row<'_>> = Vec::new();
    for module in modules {
        let expert = split_expert(&module.module);
        let alike = |row: &&mut Row<'_>| {
            let (Some((before, _, after)), Some((first, _, last))) =
                (expert, split_expert(&row.module.module))
            else {
                return false;
            };
            (before, after) == (first, last) && module.is_like(row.module)
        };
        // The experts of a layer follow each other; a row further back belongs to another layer.
        match rows.iter_mut().rev().take(NEAR).find(alike) {
            Some(row) => row.experts.extend(expert.map(|(_, index, _)| index)),
            None => rows.push(Row {
                module,
                experts: expert.map(|(_, index, _)| index).into_iter().collect(),
            }),
        }
    }
    rows.into_iter().map(Row::finish).collect()
}

/// Rows of one layer's experts that can differ: three projections, in a few schemes.
const NEAR: usize = 16;

struct Row<'a> {
    module: &'a Module,
    experts: Vec<usize>,
}

impl<'a> Row<'a> {
    fn finish(mut self) -> (String, &'a Module, u64) {
        let count = self.experts.len().max(1) as u64;
        let name = match split_expert(&self.module.module) {
            Some((before, _, after)) if count > 1 => {
                self.experts.sort_unstable();
                let (first, last) = (self.experts[0], self.experts[self.experts.len() - 1]);
                match (last - first) as u64 + 1 == count {
                    true => format!("{before}{{{first}..{last}}}{after}"),
                    false => format!("{before}{{{count} experts}}{after}"),
                }
            }
            _ => self.module.module.clone(),
        };
        (name, self.module, count)
    }
}

/// `a.experts.12.up_proj` → (`a.experts.`, 12, `.up_proj`).
fn split_expert(module: &str) -> Option<(&str, usize, &str)> {
    const EXPERTS: &str = ".experts.";
    let index = module.find(EXPERTS)? + EXPERTS.len();
    let (before, rest) = module.split_at(index);
    let digits = rest.find('.')?;
    Some((before, rest[..digits].parse().ok()?, &rest[digits..]))
}

fn totals(totals: &Totals) -> Table {
    let mut table = Table::new([
        ("total", Align::Left),
        ("parameters", Align::Right),
        ("bytes", Align::Right),
        ("", Align::Right),
    ]);
    let mut row = |what: String, parameters: Option<u64>, bytes: u64| {
        table.row([
            what,
            parameters.map_or(String::new(), |number| units::count(number as usize)),
            units::count(bytes as usize),
            units::bytes(bytes),
        ]);
    };
    let parameters = totals.fp8_parameters + totals.dense_parameters;
    let modules = units::plural(totals.fp8_modules, "module");
    row(
        format!("FP8, {modules}, with scales"),
        Some(totals.fp8_parameters),
        totals.fp8_bytes,
    );
    // Of a refused checkpoint, packed weights are in there too.
    let others = match totals.as_bf16_bytes {
        Some(_) => "dense",
        None => "everything else",
    };
    row(
        others.into(),
        Some(totals.dense_parameters),
        totals.dense_bytes,
    );
    row("in the files".into(), Some(parameters), totals.bytes);
    if let Some(dense) = totals.as_bf16_bytes {
        row("as BF16".into(), None, dense);
    }
    if let Some(loaded) = totals.loaded_bytes {
        row("loaded in BF16, FP8 kept".into(), None, loaded);
    }
    if totals.merged_experts_bytes > 0 {
        let experts = "of which merged experts, in BF16";
        row(experts.into(), None, totals.merged_experts_bytes);
    }
    table
}

fn cache(kv_cache: &KvCache) -> String {
    let mut text = kv_cache
        .scheme
        .clone()
        .unwrap_or_else(|| "no kv_cache_scheme".into());
    let _ = write!(text, "; {}", units::plural(kv_cache.scales.len(), "scale"));
    let values = || kv_cache.scales.values().flatten().copied();
    let (least, most) = (
        values().fold(f32::INFINITY, f32::min),
        values().fold(f32::NEG_INFINITY, f32::max),
    );
    if least <= most {
        let _ = write!(text, ", {least} to {most}");
    }
    for (name, values) in &kv_cache.scales {
        let _ = write!(text, "\n  {name}  {values:?}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, kind: Kind) -> Module {
        Module {
            module: name.into(),
            kind,
            group: None,
            weights: Some("channel".into()),
            activations: None,
            dtype: "F8_E4M3".into(),
            shape: vec![2, 3],
            bytes: 10,
        }
    }

    #[test]
    fn experts_that_are_alike_share_a_row() {
        let mut all: Vec<Module> = [0, 1, 10, 2]
            .iter()
            .flat_map(|expert| {
                ["down_proj", "up_proj"]
                    .map(|name| module(&format!("l.0.experts.{expert}.{name}"), Kind::Fp8))
            })
            .collect();
        all.push(module("l.0.gate", Kind::Dense));
        all.push(module("l.1.experts.0.up_proj", Kind::Fp8));
        let rows = fold_experts(&all);
        let names: Vec<(&str, u64)> = rows
            .iter()
            .map(|(name, _, count)| (name.as_str(), *count))
            .collect();
        assert_eq!(
            names,
            [
                ("l.0.experts.{4 experts}.down_proj", 4),
                ("l.0.experts.{4 experts}.up_proj", 4),
                ("l.0.gate", 1),
                ("l.1.experts.0.up_proj", 1),
            ]
        );
        // One that is different stays apart; the others are in a row now.
        all[4].kind = Kind::Refused;
        let rows = fold_experts(&all);
        assert!(rows.iter().any(|row| row.0 == "l.0.experts.10.down_proj"));
        assert!(
            rows.iter()
                .any(|row| row.0 == "l.0.experts.{0..2}.down_proj" && row.2 == 3)
        );
    }

    #[test]
    fn long_lists_are_cut() {
        let list: Vec<String> = (0..6).map(|i| i.to_string()).collect();
        assert_eq!(some_of(&list[..4]), "0, 1, 2, 3");
        assert_eq!(some_of(&list), "0, 1, 2, 3 and 2 more");
    }
}
