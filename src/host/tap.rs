//! TAP devices, by ioctl: rtnetlink cannot make them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::libc;

use crate::error::{Context, Error, Result};

nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF, libc::ifreq);
nix::ioctl_write_int_bad!(tun_set_owner, libc::TUNSETOWNER);
nix::ioctl_write_int_bad!(tun_set_persist, libc::TUNSETPERSIST);

/// A new TAP device that goes with this value until it is [kept](Self::keep):
/// whatever ends us before leaves nothing.
#[derive(Debug)]
pub struct Tap(File);

impl Tap {
    /// Makes a device that only the user `owner` (and root) may open; `None` if a
    /// device of this name exists. One with several queues is opened once for each, and by
    /// nobody who knows of one only.
    pub fn create(name: &str, owner: u32, several_queues: bool) -> Result<Option<Self>> {
        let queues = if several_queues { libc::IFF_MULTI_QUEUE } else { 0 };
        match attach(name, libc::IFF_TUN_EXCL | queues) {
            Ok(file) => {
                let tap = Self(file);
                tap.set_owner(owner).while_doing(|| format!("giving `{name}` to user {owner}"))?;
                Ok(Some(tap))
            }
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(None),
            Err(error) => Err(error).while_doing(|| format!("creating `{name}`")).map_err(help),
        }
    }

    /// Lets the device outlive this process.
    pub fn keep(self) -> io::Result<()> {
        #[expect(unsafe_code)]
        // SAFETY: TUNSETPERSIST takes an integer and keeps no pointer.
        unsafe { tun_set_persist(self.0.as_raw_fd(), 1) }?;
        Ok(())
    }

    fn set_owner(&self, owner: u32) -> nix::Result<()> {
        #[expect(unsafe_code)]
        // SAFETY: TUNSETOWNER takes an integer and keeps no pointer; the kernel reads
        // its bits as a uid.
        unsafe { tun_set_owner(self.0.as_raw_fd(), owner as i32) }?;
        Ok(())
    }
}

/// Opens an existing device: frames the guest sends are written to the file, frames
/// to the guest are read from it. Reads and writes do not block.
pub fn open(name: &str) -> Result<File> {
    attach(name, 0).while_doing(|| format!("opening TAP device `{name}`")).map_err(help)
}

fn attach(name: &str, flags: i32) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    #[expect(unsafe_code)]
    // SAFETY: `ifreq` is plain bytes, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(Errno::ENAMETOOLONG.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // Frames without a header of their own; the bits fit the kernel's 16.
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | flags;
    request.ifr_ifru.ifru_flags = flags as i16;
    #[expect(unsafe_code)]
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives across the call.
    unsafe { tun_set_iff(file.as_raw_fd(), &raw const request) }?;
    Ok(file)
}

fn help(error: Error) -> Error {
    error.help("`/dev/net/tun` must exist and be open to you: `ls -l /dev/net/tun`")
}
