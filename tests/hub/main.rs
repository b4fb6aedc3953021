//! The hub path against a hub on 127.0.0.1: what is downloaded, resumed and cached, and every refusal by variant and text.

#![cfg(feature = "hub")]

#[path = "../hub_server/mod.rs"]
mod hub_server;

mod cache;
mod download;
mod fixture;
mod from_hub;
mod refusals;
mod resume;
