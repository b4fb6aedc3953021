//! Weight and input scales: the shapes in which they are stored, the values that they may have.

use candle_fp8::ScaleLayout;

use crate::{Checkpoint, Error, dense, plan};

/// Errs if a stored scale cannot be the one of a weight `[n, k]`.
pub(crate) fn check_shape(
    checkpoint: &Checkpoint,
    name: &str,
    layout: ScaleLayout,
    n: usize,
    k: usize,
) -> Result<(), Error> {
    let view = checkpoint.view(name)?;
    let found = view.shape();
    let (fits, expected) = match layout {
        ScaleLayout::Tensor => (
            found.len() <= 2 && found.iter().all(|dim| *dim == 1),
            "[], [1] or [1, 1]".into(),
        ),
        ScaleLayout::Channel => (
            found == [n] || found == [n, 1],
            format!("[{n}] or [{n}, 1]"),
        ),
        ScaleLayout::Block { rows, cols } => {
            let blocks = [n.div_ceil(rows), k.div_ceil(cols)];
            (
                found == blocks,
                format!("{blocks:?} (blocks of {rows} × {cols})"),
            )
        }
    };
    if fits {
        Ok(())
    } else {
        Err(plan::shape(name, &expected, found))
    }
}

/// The values of a scale, each positive and finite.
pub(crate) fn check_values(checkpoint: &Checkpoint, name: &str) -> Result<Vec<f32>, Error> {
    let view = checkpoint.view(name)?;
    let values = dense::floats(&view).ok_or_else(|| Error::Dtype {
        tensor: name.into(),
        expected: "BF16, F16 or F32".into(),
        found: view.dtype(),
    })?;
    match values
        .iter()
        .position(|value| !(value.is_finite() && *value > 0.))
    {
        Some(index) => Err(Error::ScaleValue {
            tensor: name.into(),
            index,
            value: values[index],
        }),
        None => Ok(values),
    }
}
