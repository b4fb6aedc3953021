//! Which kernel computes a product.

use crate::program::{Source, Variant};
use crate::rows::PIECE;
use crate::{Element, Kernels, XpuDevice};

/// What the choice depends on.
pub(crate) struct Choice {
    pub(crate) m: usize,
    pub(crate) k: usize,
    pub(crate) x: Element,
    /// Neighbours in a row of activations that share a scale.
    pub(crate) x_run: usize,
    /// Neighbours in a row of the weight that share a scale.
    pub(crate) weight_run: usize,
}

/// A kernel with its tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// A work-item for each result.
    Any { rows: usize, cols: usize },
    /// Work-groups on tiles, of which each of 16 x 16 work-items computes `rows` rows of 4 features. `runs`: scales
    /// change along K.
    Tiled { rows: usize, runs: bool },
    /// A subgroup for `features` features and `rows` rows.
    Few {
        rows: usize,
        features: usize,
        runs: bool,
    },
    /// Matrix units on tiles of 8 rows.
    Matrix { tiles: usize, runs: bool },
}

/// Rows up to which reading the weight is most of the work.
const FEW: usize = 8;
/// Rows up to which subgroups read the weight again for each eight of them, where there are no matrix units.
const SOME: usize = 32;
/// Work-items of a work-group, where the kernel does not say.
const ITEMS: usize = 64;
/// Work-items on each side of a tile: those of a work-group are the square.
const SIDE: usize = 16;

/// How a kernel is launched.
pub(crate) struct Launch {
    pub(crate) variant: Variant,
    pub(crate) name: &'static str,
    pub(crate) groups: [usize; 2],
    pub(crate) items: [usize; 2],
}

impl Kernel {
    pub(crate) fn choose(device: &XpuDevice, choice: &Choice) -> Self {
        let &Choice {
            m,
            k,
            x,
            x_run,
            weight_run,
        } = choice;
        let changes = |run: usize| run < k;
        let fits = |run: usize| !changes(run) || run.is_multiple_of(PIECE);
        let runs = changes(x_run) || changes(weight_run);
        let room = device.info().work_group >= SIDE * SIDE;
        let any = match m > 1 && room {
            false => Self::Any { rows: 1, cols: 64 },
            true => Self::Any {
                rows: SIDE,
                cols: SIDE,
            },
        };
        if !fits(x_run) || !fits(weight_run) {
            return any;
        }
        let tiled = match m > 1 && room {
            false => any,
            true => Self::Tiled {
                rows: m.div_ceil(SIDE).next_power_of_two().min(4),
                runs,
            },
        };
        if device.kernels() == Kernels::Plain {
            return tiled;
        }
        let units = device.kernels() == Kernels::Matrix && x != Element::F32;
        if m <= FEW || !units && m <= SOME {
            let rows = m.min(FEW).next_power_of_two();
            let features = (8 / rows).clamp(1, 4);
            return Self::Few {
                rows,
                features,
                runs,
            };
        }
        match units {
            true => Self::Matrix {
                tiles: m.div_ceil(8).min(4),
                runs,
            },
            false => tiled,
        }
    }

    /// For activations of a type `[m, k]` and a weight `[n, k]`.
    pub(crate) fn launch(self, device: &XpuDevice, x: Element, m: usize, n: usize) -> Launch {
        let info = device.info();
        let lanes = match self {
            // Each work-item needs many registers, of which small subgroups have more for each.
            Self::Tiled { .. } if device.kernels() == Kernels::Plain => None,
            Self::Tiled { .. } => info.smallest_lanes(),
            _ => Some(device.inner.lanes),
        };
        self.launch_on(lanes, info.emulated, x, [m, n])
    }

    /// On subgroups of so many lanes, or none, and matrix units that are emulated or not.
    pub(crate) fn launch_on(
        self,
        lanes: Option<usize>,
        emulated: bool,
        x: Element,
        [m, n]: [usize; 2],
    ) -> Launch {
        let on_subgroups: Vec<_> = lanes.map(|lanes| ("LANES", lanes)).into_iter().collect();
        let lanes = lanes.unwrap_or(1);
        let subgroups = ITEMS / lanes.min(ITEMS);
        let (source, name, defines, features, rows, items) = match self {
            Self::Any { rows, cols } => {
                let defines = vec![("ROWS", rows), ("COLS", cols)];
                (
                    Source::ScaledMmAny,
                    "scaled_mm_any",
                    defines,
                    cols,
                    rows,
                    [cols, rows],
                )
            }
            Self::Tiled { rows, runs } => {
                let cols = 4;
                let defines = [
                    &on_subgroups[..],
                    &[("ROWS", rows), ("COLS", cols), ("RUNS", runs.into())],
                ];
                (
                    Source::ScaledMmTiled,
                    "scaled_mm_tiled",
                    defines.concat(),
                    SIDE * cols,
                    SIDE * rows,
                    [SIDE, SIDE],
                )
            }
            Self::Few {
                rows,
                features,
                runs,
            } => {
                let defines = [
                    &on_subgroups[..],
                    &[
                        ("ROWS", rows),
                        ("FEATURES", features),
                        ("RUNS", runs.into()),
                    ],
                ];
                let of_group = features * subgroups;
                (
                    Source::ScaledMmFew,
                    "scaled_mm_few",
                    defines.concat(),
                    of_group,
                    rows,
                    [subgroups * lanes, 1],
                )
            }
            Self::Matrix { tiles, runs } => {
                let defines = [
                    &on_subgroups[..],
                    &[
                        ("TILES", tiles),
                        ("RUNS", runs.into()),
                        ("EMULATED", emulated.into()),
                    ],
                ];
                let of_group = lanes * subgroups;
                (
                    Source::ScaledMmMatrix,
                    "scaled_mm_matrix",
                    defines.concat(),
                    of_group,
                    8 * tiles,
                    [subgroups * lanes, 1],
                )
            }
        };
        Launch {
            variant: Variant { source, x, defines },
            name,
            groups: [n.div_ceil(features), m.div_ceil(rows)],
            items,
        }
    }
}
