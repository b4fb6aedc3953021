//! Tests of the models on tiny made-up weights, through the public interface.

mod common;
mod config;
mod forward;
mod generation;
mod load;
mod rope;
