//! Sets as short texts: `cn[43-45,47],r[1-3]u[01-10]`.

use std::collections::HashMap;

use super::name::{MARK, Number};
use super::{NodeSet, Rows, name};

/// Who will read a folded set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Slurm too: a name with a bracket ends in one, and no range has more than 65,536
    /// names. `n1-bmc` and `n2-bmc` stay two.
    Slurm,
    /// People, pavo and ClusterShell: `n[1-2]-bmc`.
    Full,
}

impl Style {
    /// The most names of a range.
    fn longest(self) -> u64 {
        match self {
            Self::Slurm => 65_536,
            Self::Full => u64::MAX,
        }
    }
}

impl NodeSet {
    /// The set as text; of none, nothing.
    pub fn fold(&self, style: Style) -> String {
        let mut text = String::new();
        for (shape, rows) in &self.shapes {
            let brackets = rows.width > 0 && (style == Style::Full || shape.ends_with(MARK));
            match (brackets, rows.width) {
                (false, _) => rows.iter().for_each(|row| {
                    begin(&mut text);
                    name::write(shape, row, &mut text);
                }),
                (true, 1) => term(shape, &[&rows.flat], style, &mut text),
                (true, _) => boxes(rows).each(|sets| term(shape, sets, style, &mut text)),
            }
        }
        text
    }
}

/// A comma, but for the first term.
fn begin(text: &mut String) {
    if !text.is_empty() {
        text.push(',');
    }
}

/// One term: all names of a shape with each number from its set.
fn term(shape: &str, sets: &[&[Number]], style: Style, text: &mut String) {
    begin(text);
    let is_name = sets.iter().all(|set| set.len() == 1);
    let mut parts = shape.split(MARK);
    text.push_str(parts.next().unwrap_or_default());
    for (index, (set, part)) in sets.iter().zip(parts).enumerate() {
        // Slurm wants the last one in brackets where there are any.
        let is_last = style == Style::Slurm && index + 1 == sets.len();
        match set {
            [number] if is_name || !is_last => number.write(text),
            numbers => {
                text.push('[');
                ranges(numbers, style.longest(), text);
                text.push(']');
            }
        }
        text.push_str(part);
    }
}

/// Ascending numbers as ranges: `0-3,7`. A range holds `longest` at most.
pub fn ranges(numbers: &[Number], longest: u64, text: &mut String) {
    let runs = runs(numbers, longest);
    for (index, (first, last)) in runs.iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        first.write(text);
        if first != last {
            text.push('-');
            last.write(text);
        }
    }
}

/// First and last of the numbers that follow each other, in the order of the first.
fn runs(numbers: &[Number], longest: u64) -> Vec<(Number, Number)> {
    let mut runs: Vec<(Number, Number)> = Vec::new();
    // Of one value there may be several, `1` and `01`: runs lie side by side. The last of
    // each that may go on:
    let mut open: Vec<usize> = Vec::new();
    let mut value = 0;
    for number in numbers {
        if number.value() != value {
            let before = number.value().wrapping_sub(1);
            open.retain(|run| runs[*run].1.value() == before);
            value = number.value();
        }
        // With zeros in front a run keeps its digits: 098, 099, 100, and no 1000.
        let goes_on = |(first, last): (Number, Number)| {
            let alike = match first.is_padded() {
                true => last.digits() == number.digits(),
                false => !number.is_padded(),
            };
            alike && last.value() + 1 == number.value() && number.value() - first.value() < longest
        };
        // Rather one of as many digits.
        let fits = |run: &&usize| goes_on(runs[**run]);
        let best = open.iter().filter(fits).max_by_key(|run| runs[**run].0.is_padded());
        match best {
            Some(&run) => runs[run].1 = *number,
            None => {
                open.push(runs.len());
                runs.push((*number, *number));
            }
        }
    }
    runs
}

/// Rows as products of sets, `{1,2} × {1,2,3}`.
struct Boxes {
    /// Sets of numbers, by their ids.
    sets: Vec<Vec<Number>>,
    /// Each a set for each number of a name.
    boxes: Vec<Box<[usize]>>,
}

impl Boxes {
    fn each(&self, mut take: impl FnMut(&[&[Number]])) {
        for product in &self.boxes {
            let sets: Vec<&[Number]> = product.iter().map(|id| self.sets[*id].as_slice()).collect();
            take(&sets);
        }
    }
}

/// Joins rows that differ in one number, from the last number to the first. All but that
/// number is a key of a hash table, so this takes as long as there are rows, not pairs.
fn boxes(rows: &Rows) -> Boxes {
    let mut ids: HashMap<Vec<Number>, usize> = HashMap::new();
    let mut sets: Vec<Vec<Number>> = Vec::new();
    let mut id_of = |set: &[Number], sets: &mut Vec<Vec<Number>>| match ids.get(set) {
        Some(id) => *id,
        None => {
            ids.insert(set.to_vec(), sets.len());
            sets.push(set.to_vec());
            sets.len() - 1
        }
    };
    let mut boxes: Vec<Box<[usize]>> = Vec::with_capacity(rows.len());
    for row in rows.iter() {
        boxes.push(row.iter().map(|number| id_of(&[*number], &mut sets)).collect());
    }
    for axis in (0..rows.width).rev() {
        let mut alike: HashMap<Box<[usize]>, usize> = HashMap::new();
        let mut joined: Vec<(Box<[usize]>, Vec<Number>)> = Vec::new();
        for mut product in boxes {
            let id = std::mem::replace(&mut product[axis], usize::MAX);
            let place = *alike.entry(product).or_insert_with_key(|key| {
                joined.push((key.clone(), Vec::new()));
                joined.len() - 1
            });
            joined[place].1.extend_from_slice(&sets[id]);
        }
        let join = |(mut product, mut set): (Box<[usize]>, Vec<Number>)| {
            set.sort_unstable();
            product[axis] = id_of(&set, &mut sets);
            product
        };
        boxes = joined.into_iter().map(join).collect();
    }
    Boxes { sets, boxes }
}
