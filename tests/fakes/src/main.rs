//! `pavo-bmcs [COUNT [PORT [MILLISECONDS]]]`: so many BMCs until its standard input ends.
#![expect(clippy::print_stdout, reason = "it says where they are")]

use std::io::Read;
use std::time::Duration;

use pavo_fakes::{Bmcs, PASSWORD, USER};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let numbers: Result<Vec<u32>, _> = std::env::args().skip(1).map(|it| it.parse()).collect();
    let numbers = numbers?;
    let number = |at: usize, usual| numbers.get(at).copied().unwrap_or(usual);
    let (count, port) = (number(0, 10_000), u16::try_from(number(1, 0))?);
    let bmcs = Bmcs::start(count, Duration::from_millis(number(2, 50).into()), port)?;
    let (first, last) = (Bmcs::address(0), Bmcs::address(count.saturating_sub(1)));
    println!("{first} to {last}, UDP port {}, user `{USER}`, password `{PASSWORD}`", bmcs.port());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
