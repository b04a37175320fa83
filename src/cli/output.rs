//! What goes to stdout and stderr: data, talk, errors.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use nemoconv::error::Error;
pub use nemoconv::report::text::human_bytes;

/// How much is said on stderr.
#[derive(Debug, Clone, Copy)]
pub struct Talk {
    pub quiet: bool,
    pub verbose: bool,
}

impl Talk {
    pub fn new(quiet: bool, verbose: bool) -> Self {
        Self { quiet, verbose }
    }

    /// One line, unless the user wants silence.
    pub fn say(&self, line: impl Display) {
        if !self.quiet {
            print_stderr(line);
        }
    }

    /// One line for those who want more.
    pub fn detail(&self, line: impl Display) {
        if self.verbose && !self.quiet {
            print_stderr(line);
        }
    }
}

/// A line of data. A closed pipe is nobody to tell.
pub fn print_stdout(line: impl Display) {
    let _ = writeln!(io::stdout().lock(), "{line}");
}

fn print_stderr(line: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// The fact with tensor and place, then the mend on a line of its own.
pub fn print_error(error: &Error) {
    let (red, cyan, reset) = if colour() {
        ("\x1b[1;31m", "\x1b[36m", "\x1b[0m")
    } else {
        ("", "", "")
    };
    print_stderr(format_args!("{red}error{reset}: {error}"));
    if let Some(hint) = error.hint() {
        print_stderr(format_args!("{cyan}hint{reset}: {hint}"));
    }
}

fn colour() -> bool {
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Dimensions as `[256, 1024]`.
pub fn shape<T: Display>(dims: &[T]) -> String {
    let dims: Vec<_> = dims.iter().map(T::to_string).collect();
    format!("[{}]", dims.join(", "))
}

/// Rows padded to columns; the cells of `right` columns are numbers.
pub fn table(rows: &[Vec<String>], right: &[bool]) -> String {
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<_> = (0..right.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row
            .iter()
            .zip(&widths)
            .zip(right)
            .map(|((cell, &width), &right)| {
                if right {
                    format!("{cell:>width$}")
                } else {
                    format!("{cell:<width$}")
                }
            });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_string()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [
            vec!["a".into(), "10".into()],
            vec!["bcd".into(), "7".into()],
        ];
        assert_eq!(table(&rows, &[false, true]), "a    10\nbcd   7");
    }
}
