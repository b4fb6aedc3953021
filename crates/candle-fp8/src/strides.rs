//! What the strides of a tensor say of how its elements lie.

use candle_core::Layout;

/// Elements from one row `[.., K]` to the next, if rows are dense, evenly spaced and apart.
pub(crate) fn row_stride(layout: &Layout) -> Option<usize> {
    let (Some((&k, dims)), Some((&inner, strides))) =
        (layout.dims().split_last(), layout.stride().split_last())
    else {
        return Some(1);
    };
    if layout.shape().elem_count() == 0 {
        return Some(k);
    }
    if k > 1 && inner != 1 {
        return None;
    }
    // From the last axis on: each has to step over all rows of those behind it.
    let (mut first, mut rows) = (None, 1);
    for (&dim, &stride) in dims.iter().zip(strides).rev() {
        if dim == 1 {
            continue;
        }
        if stride != *first.get_or_insert(stride) * rows {
            return None;
        }
        rows *= dim;
    }
    let stride = first.unwrap_or(k);
    (stride >= k).then_some(stride)
}

/// For a layout in which values repeat: how often each comes in a row, and how many there are, one after the other in
/// memory, before the first comes again. None if they do not repeat so.
pub(crate) fn period(layout: &Layout) -> Option<(usize, usize)> {
    let axes = || layout.dims().iter().zip(layout.stride()).rev();
    let mut axes = axes().filter(|(dim, _)| **dim != 1).peekable();
    let (mut run, mut count) = (1, 1);
    while let Some((dim, _)) = axes.next_if(|(_, stride)| **stride == 0) {
        run *= dim;
    }
    while let Some((dim, _)) = axes.next_if(|(_, stride)| **stride == count) {
        count *= dim;
    }
    axes.all(|(_, stride)| *stride == 0).then_some((run, count))
}

/// A layout `[.., H, D]` as `[.., H · D]`, if heads follow each other.
#[cfg(any(test, feature = "cuda"))]
pub(crate) fn merged_heads(layout: &Layout) -> Option<Layout> {
    let (&[ref leading @ .., heads, dim], &[ref strides @ .., head, inner]) =
        (layout.dims(), layout.stride())
    else {
        return None;
    };
    let dense = (dim == 1 || inner == 1) && (heads == 1 || head == dim);
    let dims = [leading, &[heads * dim]].concat();
    let strides = [strides, &[1]].concat();
    dense.then(|| Layout::new(dims.into(), strides, layout.start_offset()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Shape;

    fn stride(dims: &[usize], strides: &[usize]) -> Option<usize> {
        row_stride(&Layout::new(Shape::from(dims), strides.to_vec(), 3))
    }

    #[test]
    fn rows_are_found_in_any_layout() {
        assert_eq!(stride(&[], &[]), Some(1));
        assert_eq!(stride(&[5], &[1]), Some(5));
        assert_eq!(stride(&[5], &[2]), None);
        assert_eq!(stride(&[4, 5], &[5, 1]), Some(5));
        assert_eq!(stride(&[2, 3, 5], &[15, 5, 1]), Some(5));
        // Some columns of a wider matrix.
        assert_eq!(stride(&[4, 5], &[12, 1]), Some(12));
        assert_eq!(stride(&[2, 3, 5], &[36, 12, 1]), Some(12));
        // Some rows of each matrix of several: uneven.
        assert_eq!(stride(&[2, 3, 5], &[60, 12, 1]), None);
        // A transposed matrix, one row for all, and axes that do not count.
        assert_eq!(stride(&[4, 5], &[1, 4]), None);
        assert_eq!(stride(&[4, 5], &[0, 1]), None);
        assert_eq!(stride(&[4, 1], &[1, 77]), Some(1));
        assert_eq!(stride(&[1, 4, 1, 5], &[99, 8, 99, 1]), Some(8));
        assert_eq!(stride(&[4, 0], &[1, 1]), Some(0));
        assert_eq!(stride(&[0, 5], &[1, 1]), Some(5));
    }

    #[test]
    fn scales_of_heads_repeat() {
        let of = |dims: &[usize], strides: &[usize]| {
            period(&Layout::new(Shape::from(dims), strides.to_vec(), 0))
        };
        // Keys [B, H, L, D] with one scale, and with one for each head.
        assert_eq!(of(&[2, 3, 5, 7], &[0, 0, 0, 0]), Some((210, 1)));
        assert_eq!(of(&[2, 3, 5, 7], &[0, 1, 0, 0]), Some((35, 3)));
        assert_eq!(of(&[2, 3, 5, 1], &[0, 1, 0, 9]), Some((5, 3)));
        // One for each value, for each column, for each row; in another order.
        assert_eq!(of(&[4, 5], &[5, 1]), Some((1, 20)));
        assert_eq!(of(&[4, 5], &[0, 1]), Some((1, 5)));
        assert_eq!(of(&[4, 5], &[1, 0]), Some((5, 4)));
        assert_eq!(of(&[4, 5], &[1, 4]), None);
        assert_eq!(of(&[2, 4, 5], &[1, 0, 2]), None);
        assert_eq!(of(&[], &[]), Some((1, 1)));
    }

    #[test]
    fn heads_that_follow_each_other_are_rows() {
        let merged = |dims: &[usize], strides: &[usize]| {
            merged_heads(&Layout::new(Shape::from(dims), strides.to_vec(), 3))
        };
        let is = |layout: Option<Layout>, dims: &[usize], strides: &[usize]| {
            let layout = layout.expect("heads follow each other");
            assert_eq!((layout.dims(), layout.stride()), (dims, strides));
            assert_eq!(layout.start_offset(), 3);
        };
        is(
            merged(&[2, 3, 4, 8], &[96, 32, 8, 1]),
            &[2, 3, 32],
            &[96, 32, 1],
        );
        // Some columns of a wider matrix, one head, and heads of one element.
        is(
            merged(&[2, 3, 4, 8], &[300, 100, 8, 1]),
            &[2, 3, 32],
            &[300, 100, 1],
        );
        is(
            merged(&[2, 3, 1, 8], &[300, 100, 77, 1]),
            &[2, 3, 8],
            &[300, 100, 1],
        );
        is(merged(&[3, 4, 1], &[4, 1, 9]), &[3, 4], &[4, 1]);
        assert!(merged(&[2, 3, 4, 8], &[96, 8, 24, 1]).is_none());
        assert!(merged(&[2, 3, 4, 8], &[96, 32, 1, 4]).is_none());
        assert!(merged(&[8], &[1]).is_none());
    }
}
