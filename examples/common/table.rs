//! Tables in plain text: columns line up, numbers at their right.

use std::fmt;

/// Where a column's cells stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// A table that is printed with [`Display`](fmt::Display): a head, a rule, the rows. Lines have no trailing spaces.
///
/// ```
/// use candle_fp8_examples::{Table, table::Align};
///
/// let mut table = Table::new([("module", Align::Left), ("bytes", Align::Right)]);
/// table.row(["q_proj", "64"]);
/// table.row(["o_proj", "1024"]);
/// table.rule();
/// table.row(["total", "1088"]);
/// assert_eq!(
///     table.to_string(),
///     "module  bytes\n\
///      ------  -----\n\
///      q_proj     64\n\
///      o_proj   1024\n\
///      ------  -----\n\
///      total    1088\n"
/// );
/// ```
#[derive(Debug, Clone)]
pub struct Table {
    columns: Vec<(String, Align)>,
    /// `None` is a rule.
    rows: Vec<Option<Vec<String>>>,
}

impl Table {
    /// An empty table of these columns.
    pub fn new<S: Into<String>>(columns: impl IntoIterator<Item = (S, Align)>) -> Self {
        let columns = columns.into_iter();
        Self {
            columns: columns.map(|(head, align)| (head.into(), align)).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row. Cells that are not given stay empty; cells beyond the last column are not printed.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows
            .push(Some(cells.into_iter().map(Into::into).collect()));
    }

    /// Adds a rule, as below the head; totals come after one.
    pub fn rule(&mut self) {
        self.rows.push(None);
    }

    /// Whether there is no row yet.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    fn widths(&self) -> Vec<usize> {
        let width = |index: usize, head: &str| {
            let cells = self.rows.iter().flatten().filter_map(|row| row.get(index));
            let widest = cells.map(|cell| cell.chars().count()).max();
            widest.unwrap_or(0).max(head.chars().count())
        };
        let heads = self.columns.iter().enumerate();
        heads.map(|(index, (head, _))| width(index, head)).collect()
    }

    fn line(&self, widths: &[usize], cell: impl Fn(usize) -> String) -> String {
        let mut line = String::new();
        for (index, (&width, (_, align))) in widths.iter().zip(&self.columns).enumerate() {
            if index > 0 {
                line.push_str("  ");
            }
            let cell = cell(index);
            match align {
                Align::Left => line.push_str(&format!("{cell:<width$}")),
                Align::Right => line.push_str(&format!("{cell:>width$}")),
            }
        }
        line.truncate(line.trim_end().len());
        line
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths();
        let rule = self.line(&widths, |index| "-".repeat(widths[index]));
        writeln!(
            f,
            "{}",
            self.line(&widths, |index| self.columns[index].0.clone())
        )?;
        writeln!(f, "{rule}")?;
        for row in &self.rows {
            match row {
                Some(cells) => {
                    let cell = |index: usize| cells.get(index).cloned().unwrap_or_default();
                    writeln!(f, "{}", self.line(&widths, cell))?;
                }
                None => writeln!(f, "{rule}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_rows_wide_cells_and_non_ascii_line_up() {
        let mut table = Table::new([("a", Align::Left), ("b", Align::Right), ("c", Align::Left)]);
        assert!(table.is_empty());
        table.row(["é", "×1", "x"]);
        table.row(["longer"]);
        table.row(["", "12345", "", "not a column"]);
        assert_eq!(
            table.to_string(),
            "a           b  c\n\
             ------  -----  -\n\
             é          ×1  x\n\
             longer\n        12345\n"
        );
    }
}
