//! Slurm's version numbers: `22.05.8` is 0x160508. Used by the build script.

/// Reads `22.05.8`, `22.05`, `0x160508` or `1443080`.
pub fn parse(text: &str) -> Option<u32> {
    let text = text.trim();
    if let Some(digits) = text.strip_prefix("0x") {
        return u32::from_str_radix(digits, 16).ok();
    }
    if !text.contains('.') {
        return text.parse().ok();
    }
    let mut parts = text.split('.');
    let mut next = || match parts.next() {
        Some(part) => part.parse::<u8>().ok(),
        None => Some(0),
    };
    let number = [next()?, next()?, next()?];
    parts.next().is_none().then(|| u32::from_be_bytes([0, number[0], number[1], number[2]]))
}

/// The number in the text of `slurm_version.h`.
pub fn in_header(text: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        parse(line.trim().strip_prefix("#define")?.trim().strip_prefix("SLURM_VERSION_NUMBER")?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_three_bytes() {
        assert_eq!(parse("22.05.8"), Some(0x160508));
        assert_eq!(parse("25.11.0"), Some(0x190b00));
        assert_eq!(parse("23.11"), Some(0x170b00));
        assert_eq!(parse("0x160508"), Some(0x160508));
        assert_eq!(parse(" 1443080\n"), Some(0x160508));
    }

    #[test]
    fn anything_else_is_no_release() {
        for text in ["", "slurm", "22.05.8-4", "22.05.8.1", "300.1.1", "22..8", "0x", "-1", "."] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn the_header_is_read() {
        let header = "/* x */\n#define SLURM_VERSION_NUMBER 0x160508\n#define OTHER 1\n";
        assert_eq!(in_header(header), Some(0x160508));
        assert_eq!(in_header("#define SLURM_VERSION_NUM(a,b,c) 1\n"), None);
    }
}
