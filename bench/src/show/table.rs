//! A table that people can read and documents can hold.

use serde::{Deserialize, Serialize};

/// Rows under a head, with a title above.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// What it is about.
    pub title: String,
    /// The names of the columns.
    pub head: Vec<String>,
    /// The cells.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// With these columns, and no row yet.
    pub fn new(title: &str, head: &[&str]) -> Self {
        let head = head.iter().map(|&name| name.to_owned()).collect();
        Self { title: title.to_owned(), head, rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row<T: Into<String>>(&mut self, cells: impl IntoIterator<Item = T>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }
}

impl std::fmt::Display for Table {
    /// As a table of Markdown with columns of equal width.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lines = || std::iter::once(&self.head).chain(&self.rows);
        let length = |cell: Option<&String>| cell.map_or(0, |cell| cell.chars().count());
        let widths: Vec<usize> = (0..self.head.len())
            .map(|column| lines().map(|line| length(line.get(column))).max().unwrap_or(0))
            .collect();
        writeln!(f, "{}\n", self.title)?;
        for (number, line) in lines().enumerate() {
            for (column, &width) in widths.iter().enumerate() {
                let cell = line.get(column).map_or("", String::as_str);
                write!(f, "| {cell}{} ", " ".repeat(width - cell.chars().count()))?;
            }
            writeln!(f, "|")?;
            if number == 0 {
                for &width in &widths {
                    write!(f, "|{}", "-".repeat(width + 2))?;
                }
                writeln!(f, "|")?;
            }
        }
        Ok(())
    }
}

/// A figure with as many digits as it deserves.
pub fn digits(value: f64) -> String {
    match value.abs() {
        size if !size.is_finite() => "–".to_owned(),
        0.0 => "0".to_owned(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

/// A figure that may be missing.
pub fn maybe(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_below_each_other() {
        let mut table = Table::new("things", &["name", "size"]);
        table.row(["µ", "1"]);
        assert_eq!(
            table.to_string(),
            "things\n\n| name | size |\n|------|------|\n| µ    | 1    |\n"
        );
    }

    #[test]
    fn figures_are_as_exact_as_they_deserve() {
        let told: Vec<_> = [1234.4, 12.34, 1.234, 0.0123, 0.0, f64::NAN].map(digits).into();
        assert_eq!(told, ["1234", "12.3", "1.23", "0.0123", "0", "–"]);
    }
}
