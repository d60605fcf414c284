//! IPMI's boot flags: boot option 5, of which two of five bytes matter.

use crate::node::power::{Boot, Device};

/// The number of the option.
pub const OPTION: u8 = 5;

const VALID: u8 = 0x80;
const ALWAYS: u8 = 0x40;
const EFI: u8 = 0x20;

/// What a controller answers when it is asked for the option, as its version, number and data.
pub fn read(answer: &[u8]) -> Option<Boot> {
    let &[_, _, flags, device, ..] = answer else { return None };
    let device = match device >> 2 & 0xf {
        1 => Device::Net,
        2 => Device::Disk,
        5 => Device::Cdrom,
        6 => Device::Bios,
        0 => Device::Default,
        _ => Device::Other,
    };
    // What is not valid is of an earlier boot.
    if flags & VALID == 0 || device == Device::Default {
        return Some(Boot::DEFAULT);
    }
    Some(Boot { device, always: flags & ALWAYS != 0 })
}

/// The number of the option and its data. None for a device that cannot be set.
pub fn write(boot: Boot, efi: bool) -> Option<[u8; 6]> {
    let device = match boot.device {
        Device::Default => return Some([OPTION, 0, 0, 0, 0, 0]),
        Device::Net => 1,
        Device::Disk => 2,
        Device::Cdrom => 5,
        Device::Bios => 6,
        Device::Other => return None,
    };
    let always = if boot.always { ALWAYS } else { 0 };
    let efi = if efi { EFI } else { 0 };
    Some([OPTION, VALID | always | efi, device << 2, 0, 0, 0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let devices = [Device::Net, Device::Disk, Device::Cdrom, Device::Bios];
        for (device, always) in devices.into_iter().flat_map(|it| [(it, false), (it, true)]) {
            let boot = Boot { device, always };
            let data = write(boot, always).unwrap();
            assert_eq!(read(&[&[1], &data[..]].concat()), Some(boot));
        }
        assert_eq!(read(&[1, 5, 0, 4, 0, 0, 0]), Some(Boot::DEFAULT), "it was for another boot");
        assert_eq!(read(&[1, 5, 0x80, 0x3c, 0, 0, 0]).unwrap().device, Device::Other);
        assert_eq!((read(&[1, 5, 0x80]), read(&[])), (None, None));
        assert_eq!(write(Boot { device: Device::Other, always: false }, false), None);
    }
}
