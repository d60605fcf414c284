//! The argument of `--vm`: `RESOURCESET:COUNT[,RESOURCESET:COUNT]…`, in the order of
//! ranks.
//!
//! It is checked where the user types it, so that nonsense costs no allocation, and
//! again on each node, where it may come from anybody. What a resource set is, only
//! pavo knows.

/// Longest argument; Slurm keeps it in the environment of every step.
const MAX_LEN: usize = 1024;
const MAX_NAME: usize = 255;
const MAX_VMS: u32 = 10_000;

/// Says what is wrong with the argument of `--vm`.
pub fn check(argument: &str) -> Result<(), String> {
    if argument.len() > MAX_LEN {
        return Err(format!("--vm: {} characters are too many, at most {MAX_LEN}", argument.len()));
    }
    let mut total = 0u32;
    for part in argument.split(',') {
        let (name, count) = part.rsplit_once(':').ok_or_else(|| wrong(part))?;
        if !is_name(name) || count.is_empty() || !count.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong(part));
        }
        let count: u32 = count.parse().unwrap_or(u32::MAX);
        if count == 0 {
            return Err(format!("--vm: `{part}` asks for no VM"));
        }
        total = total.saturating_add(count);
    }
    if total > MAX_VMS {
        return Err(format!("--vm: more than {MAX_VMS} VMs"));
    }
    Ok(())
}

fn wrong(part: &str) -> String {
    let shown: String = part.escape_debug().take(80).collect();
    format!("--vm: `{shown}` is not RESOURCESET:COUNT, such as `default:4`")
}

/// pavo's own rule for names.
fn is_name(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || b"_-.:/@+".contains(&b);
    name.len() <= MAX_NAME
        && name.bytes().all(inner)
        && !name.starts_with('-')
        && name.split('/').all(|part| !part.is_empty() && !part.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_resource_sets_are_taken() {
        for argument in
            ["eth:4", "eth:1,ib-net:3", "a.b_c-9:10000", "site/eth:1:2", "4:4", "eth:004"]
        {
            assert_eq!(check(argument), Ok(()), "{argument}");
        }
    }

    #[test]
    fn nonsense_is_named() {
        for argument in [
            "",
            ",",
            "eth",
            "eth:",
            ":4",
            "eth:x",
            "eth:-1",
            "eth:4,",
            "../x:1",
            "a/.b:1",
            "a//b:1",
            "-e:1",
            "e t:1",
            "eth:4\n",
            "eth:4\nuid=0",
            "e\0th:1",
            "éth:1",
            "eth:+4",
        ] {
            let error = check(argument).unwrap_err();
            assert!(error.contains("is not RESOURCESET:COUNT"), "{argument:?}: {error}");
            assert!(!error.contains(|c: char| c.is_control()), "{argument:?}: {error:?}");
        }
    }

    #[test]
    fn lengths_and_counts_are_bounded() {
        assert_eq!(check("eth:0"), Err("--vm: `eth:0` asks for no VM".into()));
        assert_eq!(check("eth:99999999999"), Err("--vm: more than 10000 VMs".into()));
        assert_eq!(check("a:6000,b:6000"), Err("--vm: more than 10000 VMs".into()));
        assert!(check(&"eth:1,".repeat(200)).unwrap_err().contains("at most 1024"));
        assert!(check(&format!("{}:1", "n".repeat(256))).is_err());
    }
}
