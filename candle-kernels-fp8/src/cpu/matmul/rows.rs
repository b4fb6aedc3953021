//! Rows of activations as operands.

use super::{Elements, Input, InputScales};
use crate::cpu::isa::{Isa, Job, Operand};
use std::marker::PhantomData;

/// Activations, seen as rows of operands: `planes` of them add up to a row of activations.
pub(super) struct Rows<'a> {
    input: Input<'a>,
    planes: usize,
}

impl<'a> Rows<'a> {
    pub(super) fn new<I: Isa>(isa: I, input: &Input<'a>) -> Self {
        let planes = match input.elements {
            Elements::Codes(_) => 1,
            Elements::Values(values) => isa.vectorize(Planes::<I> {
                values,
                isa: PhantomData,
            }),
        };
        Self {
            input: *input,
            planes,
        }
    }

    /// Rows of operands.
    pub(super) fn count(&self) -> usize {
        self.input.m * self.planes
    }

    /// Rows of operands that add up to a row of activations.
    pub(super) fn planes(&self) -> usize {
        self.planes
    }

    pub(super) fn k(&self) -> usize {
        self.input.k
    }

    pub(super) fn scales(&self) -> InputScales<'a> {
        self.input.scales
    }

    /// The scale of a row of operands in a group of K.
    pub(super) fn scale(&self, row: usize, group: usize) -> f32 {
        let InputScales {
            scales,
            row: rows,
            group: groups,
            ..
        } = self.input.scales;
        scales[row / self.planes * rows + group * groups]
    }

    /// The operands of a row. To be called in a [`Job`].
    #[inline(always)]
    pub(super) fn write<O: Operand>(&self, row: usize, operands: &mut [O]) {
        let (m, plane) = (row / self.planes, row % self.planes);
        let k = self.input.k;
        match self.input.elements {
            Elements::Codes(codes) => O::decode(&codes[m * k..][..k], operands),
            Elements::Values(values) => O::split(&values[m * k..][..k], plane, operands),
        }
    }
}

struct Planes<'a, I> {
    values: &'a [f32],
    isa: PhantomData<I>,
}

impl<I: Isa> Job for Planes<'_, I> {
    type Output = usize;

    #[inline(always)]
    fn run(self) -> usize {
        I::Operand::planes(self.values)
    }
}
