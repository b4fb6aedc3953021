//! `perplexity`, `inspect` and `bench`, run as a user runs them; and the unit tests of their modules, which Cargo does not run
//! in examples.

// Each test binary uses its part of the shared module.
#[allow(dead_code, unreachable_pub)]
#[path = "../support/mod.rs"]
mod support;

#[allow(dead_code)]
#[path = "../../examples/bench/main.rs"]
mod bench_example;
#[allow(dead_code)]
#[path = "../../examples/inspect/main.rs"]
mod inspect_example;
#[allow(dead_code)]
#[path = "../../examples/perplexity/main.rs"]
mod perplexity_example;

mod bench;
mod inspect;
mod perplexity;
mod run;
