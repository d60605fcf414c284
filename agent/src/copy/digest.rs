//! What a file holds, in 16 bytes: so the two ends find out whether they have the same. Not
//! against who wants to deceive: either may send what it likes anyway.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::holes::{data_from, hole_from};

/// What lies in a hole is counted in such blocks, and not read.
const BLOCK: usize = 64 << 10;

/// The digest of the first `length` bytes, as if zeros followed where the file ends. It takes
/// as long as there is data, however long the holes are.
pub fn digest(file: &File, length: u64) -> io::Result<[u8; 16]> {
    const STEP: u64 = BLOCK as u64;
    let (mut all, mut bytes) = (block(&length.to_le_bytes()), vec![0; BLOCK]);
    // Whole blocks of zeros before this one, stored or not.
    let mut zeros = 0_u64;
    let mut at = 0;
    while at < length {
        let empty = (data_from(file, at, length) - at) / STEP;
        (zeros, at) = (zeros + empty, at + empty * STEP);
        let end = length.min(hole_from(file, at, length).max(at + 1).next_multiple_of(STEP));
        while at < end {
            let count = (length - at).min(STEP) as usize;
            let read = read_all(file, &mut bytes[..count], at)?;
            bytes[read..count].fill(0);
            at += count as u64;
            if count == BLOCK && bytes.iter().all(|byte| *byte == 0) {
                zeros += 1;
                continue;
            }
            all = mix(all, (std::mem::take(&mut zeros), 1));
            all = mix(all, block(&bytes[..count]));
        }
    }
    all = mix(all, (zeros, 2));
    let (a, b) = (finish(all.0 ^ all.1.rotate_left(32)), finish(all.1));
    Ok([a.to_le_bytes(), b.to_le_bytes()].concat().try_into().expect("16 bytes"))
}

fn read_all(file: &File, bytes: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], at + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

fn mix(state: (u64, u64), with: (u64, u64)) -> (u64, u64) {
    let a = (state.0 ^ with.0).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    let b = (state.1 ^ with.1).wrapping_mul(0xc2b2_ae3d_27d4_eb4f).rotate_left(31);
    (a.wrapping_add(b), b ^ a.rotate_left(17))
}

fn finish(mut word: u64) -> u64 {
    word = (word ^ (word >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    word = (word ^ (word >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    word ^ (word >> 33)
}

fn block(bytes: &[u8]) -> (u64, u64) {
    let mut state = (0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344 ^ bytes.len() as u64);
    let word = |bytes: &[u8]| {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(word)
    };
    for pair in bytes.chunks(16) {
        let (first, second) = pair.split_at(pair.len().min(8));
        state = mix(state, (word(first), word(second)));
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn each_bit_counts_and_a_hole_is_zeros() {
        let path = std::env::temp_dir().join(format!("pavo-agent-digest-{}", std::process::id()));
        let mut file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let length = 10 * BLOCK as u64 + 100;
        file.set_len(length).unwrap();
        let hole = digest(&file, length).unwrap();
        file.write_all(&vec![0; length as usize]).unwrap();
        assert_eq!(digest(&file, length).unwrap(), hole);
        let mut seen = vec![hole, digest(&file, length - 1).unwrap()];
        for at in [0, 7, 8, 15, 16, BLOCK as u64, length - 1] {
            for bit in [1, 0x80] {
                file.write_at(&[bit], at).unwrap();
                seen.push(digest(&file, length).unwrap());
                file.write_at(&[0], at).unwrap();
            }
        }
        // Blocks in another order are something else.
        for at in [BLOCK as u64, 2 * BLOCK as u64] {
            file.write_at(&[5; BLOCK], at).unwrap();
            seen.push(digest(&file, length).unwrap());
            file.write_at(&[0; BLOCK], at).unwrap();
        }
        let count = seen.len();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), count);
        // The longest hole there is room for.
        file.set_len(8 << 40).unwrap();
        let long = digest(&file, 8 << 40).unwrap();
        assert!(long != hole && digest(&file, (8 << 40) - 1).unwrap() != long);
        file.set_len(3).unwrap();
        assert_eq!(digest(&file, length).unwrap(), hole, "what is missing is zeros");
    }
}
