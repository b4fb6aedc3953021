//! How fast the CUDA kernels are: each is checked, then timed over weights that do not fit the L2 cache, as a replayed
//! graph; beside them the same bytes are only read, and PyTorch multiplies, in the same run. A second table times the
//! kernels that make a product's activations, as shares of the product.

mod attention;
mod cases;
mod decode;
mod device;
mod peer;
mod producers;
mod products;
mod random;
mod tokens;

use clap::Parser;

/// Times products of activations with FP8 weights on a GPU.
///
/// Prints medians: µs of a launch, TFLOP/s, GB/s of the bytes that must move, and how often that time goes into those of
/// PyTorch's scaled_mm with scales of rows (row), with one scale (tensor), of its bf16 product, and of a pure read of the
/// same bytes (read; above 1: slower than the read).
///
/// With --producers, times kernels that write a product's activations instead, alone and with the result quantized, on
/// BF16: us and GB/s as above; us more than alone (extra); and those in percent of the product that follows in a Llama
/// 8B (qkv 6144x4096 after norms, down 4096x14336 after SiLU x up). Of a quantizer alone, all of its time is extra.
/// Launches go through 2 to 64 copies of what is read and written, 300 MB if so many are as much; with fewer rows, the
/// L2 cache holds them all, as it mostly does in a model.
///
/// With --attention, times attention in BF16 over keys and values past the L2 cache, the kernel that rotates and
/// appends before it, and both one after the other; --sweep times every kernel but the slowest.
///
/// With --decode, times what a step has around its layers: lm_head in BF16 for up to 16 rows beside a pure read of it
/// (read; above 1: slower than the read), the choice of the largest logit, both one after the other, and embedding.
#[derive(Debug, Clone, Parser)]
#[command(name = "cuda")]
struct Args {
    /// Time norms, SiLU x up, quantizers, casts and dequantization instead of products.
    #[arg(long, conflicts_with_all = ["shapes", "scheme", "sweep", "peer"])]
    producers: bool,

    /// Time attention instead of products.
    #[arg(long, conflicts_with_all = ["producers", "shapes", "scheme", "m", "peer"])]
    attention: bool,

    /// Time lm_head, the choice of a token and embedding instead of products.
    #[arg(long, conflicts_with_all = ["producers", "attention", "shapes", "scheme", "sweep", "peer"])]
    decode: bool,

    /// Of attention and --decode, only those of models whose name contains this.
    #[arg(long, value_name = "PART", default_value = "")]
    layer: String,

    /// Output × input features, such as 6144x4096; a name of `--list` is one too. All of the list if none is given.
    #[arg(long = "shape", value_name = "N×K")]
    shapes: Vec<String>,

    /// Rows of activations; 1,16,512,2048,8192 if none are given with --producers, 1,4,8,16 with --decode.
    #[arg(
        short,
        long,
        value_delimiter = ',',
        default_value = "1,4,16,32,64,128,512,2048,8192",
        default_value_ifs([("producers", "true", "1,16,512,2048,8192"), ("decode", "true", "1,4,8,16")])
    )]
    m: Vec<usize>,

    /// What is multiplied.
    #[arg(long, value_enum, default_value = "row")]
    scheme: cases::Scheme,

    /// Where the codes of the weight are; the read goes through as many bytes.
    #[arg(long, value_enum, default_value = "panels")]
    layout: cases::Layout,

    /// Add codes up in the tensor cores alone.
    #[arg(long)]
    fast: bool,

    /// Launch kernels while the one before still runs (programmatic dependent launch).
    #[arg(long)]
    dependent: bool,

    /// Time every kernel that serves, not only the chosen one.
    #[arg(long)]
    sweep: bool,

    /// Of a sweep, only kernels whose name contains this.
    #[arg(long, value_name = "PART", default_value = "", requires = "sweep")]
    kernel: String,

    /// Command that runs tools/peers/scaled_mm.py, such as "python3 tools/peers/scaled_mm.py".
    #[arg(long, value_name = "COMMAND")]
    peer: Option<String>,

    /// Replays of a graph, of which the median counts.
    #[arg(long, default_value_t = 15)]
    replays: usize,

    /// Print the shapes that have names, and stop.
    #[arg(long)]
    list: bool,

    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    if args.list {
        for (name, (n, k)) in cases::SHAPES {
            println!("{name:<14} {n:>5}x{k}");
        }
        return Ok(());
    }
    match &args {
        Args {
            producers: true, ..
        } => producers::run(&args),
        Args {
            attention: true, ..
        } => attention::run(&args),
        Args { decode: true, .. } => decode::run(&args),
        _ => products::run(&args),
    }
}
