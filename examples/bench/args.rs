//! The command line.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use candle_fp8_examples::DeviceArgs;
use clap::Parser;

use super::peer::Peer;
use super::random::LmHead;
use super::shape::Shape;

/// Times a model of random FP8 weights: no checkpoint is needed.
///
/// Linears are FP8 with a scale for each output channel, and their inputs are quantized for each token, as in an
/// FP8-dynamic checkpoint. As there, embedding, norms, router and lm_head are dense; so are merged experts.
#[derive(Parser, Debug)]
#[command(version, after_help = METHOD)]
pub(crate) struct Args {
    /// Dimensions of the model.
    #[arg(long, value_enum, default_value_t = Shape::Llama1b)]
    pub(crate) shape: Shape,

    /// Take only the first N layers. [default: all]
    #[arg(long, value_name = "N")]
    pub(crate) layers: Option<usize>,

    /// The output projection: in BF16, as checkpoints leave it, or in FP8 like the other linears.
    #[arg(long, value_enum, value_name = "KIND", default_value_t = LmHead::Bf16)]
    pub(crate) lm_head: LmHead,

    /// Lengths of prompts, one sequence each; 0 for none.
    #[arg(
        long,
        value_name = "TOKENS",
        value_delimiter = ',',
        default_value = "512,2048"
    )]
    pub(crate) prefill: Vec<usize>,

    /// Decode steps of each run; 0 for none.
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    pub(crate) decode: usize,

    /// Positions in the cache of each sequence when decoding starts.
    #[arg(
        long,
        value_name = "TOKENS",
        value_delimiter = ',',
        default_value = "128"
    )]
    pub(crate) context: Vec<usize>,

    /// Sequences that are decoded together.
    #[arg(
        long,
        value_name = "SEQUENCES",
        value_delimiter = ',',
        default_value = "1,8"
    )]
    pub(crate) batch: Vec<usize>,

    /// Run everything once more and print where the time goes.
    #[arg(long)]
    pub(crate) profile: bool,

    /// Run everything on other models of the shape too, one after the other, and print how many times as fast ours is.
    #[arg(long, value_enum, value_name = "PEER", value_delimiter = ',')]
    pub(crate) peer: Vec<Peer>,

    /// Write the model into a new folder as a checkpoint, with the tokenizer of this repository's stories, and measure
    /// nothing. For shapes without experts.
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with_all = [
            "prefill", "decode", "context", "batch", "profile", "peer", "linears", "json", "dtype", "xpu",
        ]
    )]
    pub(crate) save: Option<PathBuf>,

    /// Time single linears of the shape instead of the model. CPU only.
    #[arg(long, conflicts_with_all = ["layers", "lm_head", "prefill", "decode", "context", "batch", "profile", "peer"])]
    pub(crate) linears: bool,

    /// Rows of activations that single linears get.
    #[arg(
        long,
        value_name = "M",
        value_delimiter = ',',
        default_value = "1,4,16,64,512",
        requires = "linears"
    )]
    pub(crate) rows: Vec<usize>,

    /// Copies of a single linear's weights take turns until so many megabytes have been read: more than caches hold.
    #[arg(long, value_name = "MB", default_value_t = 256, requires = "linears")]
    pub(crate) rotate: u64,

    /// Print one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) device: DeviceArgs,
}

/// What the numbers mean.
const METHOD: &str = "\
What is measured:
  prefill    One prompt of random tokens, from the token ids to the token sampled after it. The median of 3 runs,
             or of fewer when they take more than 5 s; a short prompt warms up.
  decode     Greedy steps of all sequences together, after --context random positions, the last of which is a step of
             its own to warm up: on a GPU it also captures the graph that the others replay.
  tokens/s   Of all sequences together. Sampling (argmax) and the read-back of the token are inside the time.
  bytes a token
             What a decode step has to read, divided by the sequences, in the mean over the steps: every weight and
             scale once, in the dtype in which it is kept; of the embedding one row a sequence; keys and values of every
             position, the new one included. Of E experts, those that are touched: k for one sequence; for a batch the
             mean when every token takes k at random, E·(1 - (1 - k/E)^batch) (computed, not counted).
  GB/s       tokens/s × bytes a token, in 10^9 bytes a second.
  read GB/s, % of read
             What the machine reads meanwhile: 128 MiB from first to last, summed up on as many threads as the model has,
             after each step, the model's clock standing still; and GB/s of that. A machine that others share is not as
             fast in one second as in the next, so the rate above the table, the best of 8 reads of 512 MiB before
             everything and 8 after it, is another. The rate of multiply-adds there, of the kind that the matmuls use and
             from registers alone, is the better of one before and one after. CPU only.
  device memory
             On CUDA, what tensors take. 'To work in' is the most that a prefill has beside weights and KV cache;
             'outside' of the tensors' pool are the context, kernels' code, and other programs.
  --profile  Means over the steps of a decode run, and over 3 prompts. GB/s are of a part's weights and scales, or of
             keys and values; GFLOP/s of the products with weights. 'rest' is what no part accounts for. Op by op: on
             CUDA, where other decode steps are replayed as a graph, a step takes longer.
  --linears  Each call as the model makes it, quantization of its input and allocation of its result included: the
             median over at least 0.4 s and 3 calls, after some elements were checked against f64. Copies of the weights
             take turns, so that they come from memory. '% of peak' is the time that the machine needs at least (weights
             and scales at its read bandwidth, or 2·M·N·K operations at its multiply-add rate, whichever is longer, as
             'bound' says) in the time that was taken. Candle's is the fastest call of candle_nn::Linear on BF16
             activations and weights of the same shape, all weights in one.
  --peer     After our model has left the memory; on a CPU at most 8 decode steps a run. '×' is ours divided by theirs.
             dequantized: the same weights, with all linears dense in the model's dtype, on our code.
             candle: the Llama of candle-transformers as it is, all in BF16, on weights as random, with the same
             allocator. It keeps scores of all queries and heads: 'no memory' stands where they do not fit.
Logits are checked to be finite in every step; if they are not, the run fails. In greedy steps by what chooses the token,
which reads them all: the answer comes with the token. After prompts, in profiles and of the peer by their sum, inside the
time.";

impl Args {
    /// Errs if something was asked for that cannot be.
    pub(crate) fn check(&self) -> Result<()> {
        let numbers = self.batch.iter().chain(&self.context);
        ensure!(
            numbers.into_iter().all(|&number| number > 0),
            "--batch and --context: expected numbers of at least 1"
        );
        ensure!(
            self.rows.iter().all(|&rows| rows > 0),
            "--rows: expected numbers of at least 1"
        );
        for peer in &self.peer {
            peer.check(self.shape)?;
        }
        Ok(())
    }

    /// Layers of the model.
    pub(crate) fn layers(&self) -> usize {
        self.layers.unwrap_or(self.shape.layers())
    }

    /// Lengths of the prompts.
    pub(crate) fn prompts(&self) -> impl Iterator<Item = usize> {
        self.prefill.iter().copied().filter(|&tokens| tokens > 0)
    }

    /// Context and batch of the runs of decode steps.
    pub(crate) fn decodes(&self) -> impl Iterator<Item = (usize, usize)> {
        let contexts = self.context.iter().filter(|_| self.decode > 0);
        contexts.flat_map(|&context| self.batch.iter().map(move |&batch| (context, batch)))
    }
}
