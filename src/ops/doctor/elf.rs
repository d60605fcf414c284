//! The one number of a shared library that Slurm looks at: read, not loaded.

/// The value of an exported `uint32_t`, in a 64-bit little-endian ELF file.
pub fn exported_u32(file: &[u8], name: &str) -> Option<u32> {
    const DYNSYM: u32 = 11;
    file.starts_with(b"\x7fELF\x02\x01").then_some(())?;
    let sections = table(file, u64_at(file, 40)?, u16_at(file, 58)?, u16_at(file, 60)?)?;
    let symbols = *sections.iter().find(|section| u32_at(section, 4) == Some(DYNSYM))?;
    let names = body(file, sections.get(u32_at(symbols, 40)? as usize)?)?;
    let symbol = body(file, symbols)?.chunks_exact(24).find(|symbol| {
        let start = u32_at(symbol, 0).unwrap_or(0) as usize;
        let found = names.get(start..).and_then(|rest| rest.split(|byte| *byte == 0).next());
        found == Some(name.as_bytes())
    })?;
    let address = u64_at(symbol, 8)?;
    let segments = table(file, u64_at(file, 32)?, u16_at(file, 54)?, u16_at(file, 56)?)?;
    segments.iter().find_map(|segment| {
        // A part of the file that is loaded, from an offset to an address.
        (u32_at(segment, 0)? == 1).then_some(())?;
        let within = address.checked_sub(u64_at(segment, 16)?)?;
        (within < u64_at(segment, 32)?).then_some(())?;
        u32_at(file, usize::try_from(u64_at(segment, 8)?.checked_add(within)?).ok()?)
    })
}

/// Entries of the same size.
fn table(file: &[u8], start: u64, size: u16, count: u16) -> Option<Vec<&[u8]>> {
    let start = usize::try_from(start).ok()?;
    let end = start.checked_add(usize::from(size) * usize::from(count))?;
    (size > 0).then(|| Some(file.get(start..end)?.chunks_exact(size.into()).collect()))?
}

/// What a section holds.
fn body<'f>(file: &'f [u8], section: &[u8]) -> Option<&'f [u8]> {
    let start = usize::try_from(u64_at(section, 24)?).ok()?;
    let size = usize::try_from(u64_at(section, 32)?).ok()?;
    file.get(start..start.checked_add(size)?)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_library_has_no_number() {
        assert_eq!(exported_u32(b"", "x"), None);
        assert_eq!(exported_u32(b"#!/bin/sh\n", "x"), None);
        let mut header = vec![0xff; 64];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        assert_eq!(exported_u32(&header, "x"), None);
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(exported_u32(&own, "no such symbol"), None);
        for end in (0..4096).step_by(7) {
            assert_eq!(exported_u32(&own[..end], "environ"), None);
        }
    }
}
