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
        ScaleLayout::Tensor => (is_single(found), "[], [1] or [1, 1]".into()),
        ScaleLayout::Channel => (
            found == [n] || found == [n, 1],
            format!("[{n}] or [{n}, 1]"),
        ),
        ScaleLayout::Block { rows, cols } => {
            let blocks = layout.shape(n, k);
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

/// Whether a stored shape is that of one scale for everything.
pub(crate) fn is_single(shape: &[usize]) -> bool {
    shape.len() <= 2 && shape.iter().all(|dim| *dim == 1)
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
