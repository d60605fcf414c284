//! The agent that runs in guests, as the bytes of a program.

/// A static program for guests of this machine's architecture (`agent/`, built by `build.rs`).
pub const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pavo-agent"));

/// Starts it where there is systemd.
pub const UNIT: &str = include_str!("../../agent/pavo-agent.service");

/// Where it lies in a guest, as the unit says.
pub const PATH: &str = "/usr/local/sbin/pavo-agent";
/// Where the unit lies.
pub const UNIT_PATH: &str = "/etc/systemd/system/pavo-agent.service";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_needs_nothing_of_its_guest() {
        assert!(PROGRAM.len() <= 3 << 20, "{} bytes", PROGRAM.len());
        assert!(PROGRAM.starts_with(b"\x7fELF"));
        // No segment that names a dynamic loader (type 3).
        let word = |at: usize| u16::from_le_bytes(PROGRAM[at..at + 2].try_into().unwrap());
        let start = u64::from_le_bytes(PROGRAM[32..40].try_into().unwrap()) as usize;
        let (size, count) = (usize::from(word(54)), usize::from(word(56)));
        assert!(count > 0);
        for header in 0..count {
            assert_ne!(word(start + header * size), 3, "it is dynamic");
        }
    }
}
