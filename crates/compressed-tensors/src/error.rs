//! What can be wrong with a quantization config, and what a module's scheme can ask for that no FP8 op serves.

/// Everything that this crate refuses.
///
/// `path` is where in config.json the value sits, for example
/// `quantization_config.config_groups.group_0.weights.strategy`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value has the wrong JSON type or is out of its range.
    #[error("config.json: `{path}`: expected {expected}, found {found}")]
    Malformed {
        /// Where the value sits.
        path: String,
        /// What the format allows there.
        expected: String,
        /// The value as found, shortened.
        found: String,
    },

    /// A key that compressed-tensors forbids in a scheme or in its args. It may change what the numbers mean, so it
    /// is not skipped.
    #[error(
        "config.json: `{path}`: unknown key `{key}`, expected only {allowed}; the file may be newer than this crate"
    )]
    UnknownKey {
        /// The object that holds the key.
        path: String,
        /// The key.
        key: String,
        /// The keys that are allowed, comma-separated.
        allowed: String,
    },

    /// A word that is not one of the format's: an unknown strategy, type, dynamic kind, actorder, activation scheme.
    #[error("config.json: `{path}`: unknown value `{found}`, expected one of {allowed}")]
    UnknownValue {
        /// Where the value sits.
        path: String,
        /// The word as found.
        found: String,
        /// The words that are allowed, comma-separated.
        allowed: String,
    },

    /// A group in preset form (`{"FP8_DYNAMIC": ["Linear"]}`) whose name is no preset.
    #[error(
        "config.json: `{path}`: a list of targets makes `{name}` a preset's name, and there is no such preset; \
         expected {known}, or an object with `targets` and `weights`"
    )]
    UnknownPreset {
        /// Where the group sits.
        path: String,
        /// The group's name.
        name: String,
        /// The presets, comma-separated.
        known: String,
    },

    /// Args which contradict themselves, such as a block strategy without `block_structure`.
    #[error("config.json: `{path}`: {reason}")]
    InvalidArgs {
        /// Where the args sit.
        path: String,
        /// What contradicts what.
        reason: String,
    },

    /// Neither `quant_method` nor `config_groups` says what the config is.
    #[error(
        "config.json: `{path}` names no quant_method and has no config_groups; expected quant_method \
         \"compressed-tensors\" or \"fp8\""
    )]
    MissingMethod {
        /// Where the config sits.
        path: String,
    },

    /// Another quantization method (gptq, awq, bitsandbytes, …).
    #[error(
        "config.json: `{path}`: quant_method `{method}` is not served; expected \"compressed-tensors\" or \"fp8\": \
         load a checkpoint quantized to FP8"
    )]
    UnsupportedMethod {
        /// Where the method sits.
        path: String,
        /// The method as found.
        method: String,
    },

    /// `config_groups` is absent, null or `{}`, and neither a KV cache scheme nor sparsity explains it.
    #[error(
        "config.json: `{path}` is empty: the checkpoint calls itself quantized but says of no module how; expected at \
         least one group with targets and weights"
    )]
    EmptyConfigGroups {
        /// Where the groups should be.
        path: String,
    },

    /// A `re:` pattern does not compile, or uses what the regex engine does not have (lookaround, backreferences) or
    /// reads otherwise than Python does.
    #[error("config.json: `{path}`: the pattern `{pattern}` cannot be used: {reason}")]
    Pattern {
        /// The list that holds the pattern.
        path: String,
        /// The pattern, without `re:`.
        pattern: String,
        /// Why not.
        reason: String,
    },

    /// A `re:` pattern whose compiled form exceeds the size limit.
    #[error(
        "config.json: `{path}`: the pattern `{pattern}` is refused: compiled it exceeds {limit} bytes; write it with \
         smaller repetitions"
    )]
    PatternTooBig {
        /// The list that holds the pattern.
        path: String,
        /// The pattern, without `re:`.
        pattern: String,
        /// The limit in bytes.
        limit: usize,
    },

    /// A module's scheme is valid but no FP8 op serves it.
    #[error("module `{module}`, group `{group}`: {reason}")]
    Unsupported {
        /// The module.
        module: String,
        /// The group of `config_groups` that it matched.
        group: String,
        /// What is not served, and what would be.
        reason: String,
    },

    /// `kv_cache_scheme` is valid but not served.
    #[error("kv_cache_scheme: {reason}")]
    UnsupportedKvCache {
        /// What is not served, and what would be.
        reason: String,
    },
}
