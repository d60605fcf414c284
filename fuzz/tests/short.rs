//! A short look with any compiler: every target reads its first inputs and mutations of them,
//! the same ones in every run. `PAVO_FUZZ=100000` reads as many of each, `PAVO_FUZZ_SEED=7`
//! others; an input that breaks something is written to `target/fuzz/`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use pavo_fuzz::TARGETS;

/// How many mutations each target reads.
const RUNS: u64 = 2000;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

fn short(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let mut random = Random(number("PAVO_FUZZ_SEED", 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let seeds = (target.seeds)();
    let taken = seeds.iter().filter(|seed| (target.read)(seed)).count();
    assert!(taken > 0, "no first input gets far");
    let mutated = (0..number("PAVO_FUZZ", RUNS)).map(|_| random.mutate(&seeds));
    for input in mutated {
        if catch_unwind(AssertUnwindSafe(|| (target.read)(&input))).is_err() {
            let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../fuzz");
            std::fs::create_dir_all(&dir).unwrap();
            let file = dir.join(name);
            std::fs::write(&file, &input).unwrap();
            panic!("`{name}` breaks on the input in {}: {input:?}", file.display());
        }
    }
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            short(stringify!($name));
        })*

        #[test]
        fn every_target_is_here() {
            let here: &[&str] = &[$(stringify!($name)),*];
            assert_eq!(here, TARGETS.iter().map(|target| target.name).collect::<Vec<_>>());
        }
    };
}

targets!(config cluster sets nodeset inventory user_data image dhcp dhcp6 dns guest_agent agent_line pcocc_agent copy qmp ask messages ipmi redfish);

/// Numbers that look random (Marsaglia's xorshift), the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end.max(1) as u64) as usize
    }

    /// A seed with some changes.
    fn mutate(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut input = seeds[self.below(seeds.len())].clone();
        for _ in 0..=self.below(6) {
            self.change(&mut input, seeds);
        }
        input
    }

    fn change(&mut self, input: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        const NUMBERS: [u64; 8] =
            [0, 1, 0x7f, 0xff, 0xffff, 0x7fff_ffff, u32::MAX as u64, u64::MAX];
        const TEXTS: [&str; 14] = [
            "\0",
            "\n",
            "\r",
            "../",
            "%",
            ",",
            ":",
            "{",
            "[[[[",
            "-",
            "\u{202e}",
            "\x1b[2J",
            "999999999999999999999",
            "\u{feff}",
        ];
        let at = self.below(input.len() + 1);
        let some = self.below(8.min(input.len() - at) + 1);
        match self.below(8) {
            0 if at < input.len() => input[at] ^= 1 << self.below(8),
            1 if at < input.len() => input[at] = self.below(256) as u8,
            2 => drop(input.drain(at..at + some)),
            3 => {
                let number = NUMBERS[self.below(NUMBERS.len())].to_le_bytes();
                input[at..at + some].copy_from_slice(&number[..some]);
            }
            4 => drop(input.splice(at..at, TEXTS[self.below(TEXTS.len())].bytes())),
            5 => input.truncate(at),
            6 => {
                let other = &seeds[self.below(seeds.len())];
                let from = self.below(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            _ => {
                let again = input[at..].to_vec();
                input.splice(at..at, again.into_iter().take(64));
            }
        }
    }
}
