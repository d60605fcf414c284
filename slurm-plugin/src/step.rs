//! Which step owns the cluster that `--vm` asks for.
//!
//! Slurm hands `--vm` of salloc and sbatch down to every step of the job, so a node
//! must tell a step that was asked for VMs from one that inherited the words. Only
//! srun knows, hence it leaves a mark in the step's environment. The user may
//! forge the mark and gains nothing: `own` is what an own `--vm` says.

/// The variable srun leaves its mark in. Slurm passes `SLURM_*` in any `--export`.
pub const MARK: &str = "SLURM_PAVO_STEP";

/// Step ids from here on are Slurm's own: extern, batch, interactive.
const SPECIAL: u32 = 0xffff_fff0;

/// How a step came by its `--vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// It stands on srun's own command line.
    Own,
    /// It was given to salloc or sbatch.
    Inherited,
    /// Inherited, by a step with `--overlap`.
    Overlap,
}

impl Mark {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Inherited => "inherited",
            Self::Overlap => "overlap",
        }
    }

    /// Reads a mark. Without one, srun had no plugin or the environment was cut: the
    /// step then counts as one that inherited.
    pub fn read(text: &str) -> Self {
        match text {
            "own" => Self::Own,
            "overlap" => Self::Overlap,
            _ => Self::Inherited,
        }
    }
}

/// Whether a step with `--vm` owns the cluster.
pub fn owns(step: u32, mark: Mark) -> bool {
    match mark {
        _ if step >= SPECIAL => false,
        Mark::Own => true,
        Mark::Inherited => step == 0,
        Mark::Overlap => false,
    }
}

/// Whether srun's command line says `--overlap`. The command's own words, `command`
/// of them, come last and may say anything.
pub fn overlaps(line: &[u8], command: usize) -> bool {
    let words: Vec<&[u8]> = line.split(|&b| b == 0).filter(|word| !word.is_empty()).collect();
    let options = words.len().saturating_sub(command);
    let prefixes = [&b"--overl"[..], b"--overla", b"--overlap"];
    words[..options].iter().any(|word| prefixes.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ordinary_step_owns_what_the_allocation_asked_for() {
        assert!(owns(0, Mark::Inherited));
        assert!(!owns(1, Mark::Inherited));
        assert!(!owns(0, Mark::Overlap));
        for special in [0xffff_fffa, 0xffff_fffb, 0xffff_fffc] {
            assert!(!owns(special, Mark::Inherited));
            assert!(!owns(special, Mark::Own));
        }
    }

    #[test]
    fn a_step_with_its_own_option_owns() {
        assert!(owns(0, Mark::Own));
        assert!(owns(7, Mark::Own));
    }

    #[test]
    fn marks_are_read_back() {
        for mark in [Mark::Own, Mark::Inherited, Mark::Overlap] {
            assert_eq!(Mark::read(mark.as_str()), mark);
        }
        assert_eq!(Mark::read(""), Mark::Inherited);
    }

    #[test]
    fn overlap_is_an_option_of_srun_only_before_the_command() {
        assert!(overlaps(b"srun\0--overlap\0-n1\0prog\0", 1));
        assert!(overlaps(b"srun\0-n1\0--overl\0prog\0x\0", 2));
        assert!(!overlaps(b"srun\0-n1\0prog\0--overlap\0", 2));
        assert!(!overlaps(b"srun\0--overcommit\0prog\0", 1));
        assert!(!overlaps(b"", 5));
    }
}
