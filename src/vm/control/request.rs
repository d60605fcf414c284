//! A request, as it comes.

use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::{MAX_REQUEST, Op, Request, VERSION};
use crate::error::{Error, Result};

/// A line, without reading past it: what follows may be the console's. `ahead` was read of it
/// already.
pub(super) async fn line(
    stream: &mut (impl AsyncRead + Unpin),
    ahead: Option<u8>,
) -> Option<Vec<u8>> {
    if ahead == Some(b'\n') {
        return Some(Vec::new());
    }
    rest_of_line(stream, &mut Vec::from_iter(ahead)).await
}

/// The same; what has come of it stays in `line` where nobody waits to the end.
pub(super) async fn rest_of_line(
    stream: &mut (impl AsyncRead + Unpin),
    line: &mut Vec<u8>,
) -> Option<Vec<u8>> {
    loop {
        match stream.read_u8().await.ok()? {
            b'\n' => return Some(std::mem::take(line)),
            _ if line.len() == MAX_REQUEST => return None,
            byte => line.push(byte),
        }
    }
}

/// Whether who has asked has hung up. A process that stood still for a while would otherwise do
/// what was given up long ago.
pub(super) async fn given_up(
    stream: &mut (impl AsyncRead + Unpin),
    ahead: &mut Option<u8>,
) -> bool {
    let mut byte = [0];
    tokio::select! {
        biased;
        read = stream.read(&mut byte) => match read {
            Ok(1) => {
                *ahead = Some(byte[0]);
                false
            }
            _ => true,
        },
        () = std::future::ready(()) => false,
    }
}

pub(super) fn parse(line: &[u8]) -> Result<Op> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let wrong = |error: serde_json::Error| {
        Error::usage("the request is not understood").because(error.to_string())
    };
    let versioned: Versioned = serde_json::from_slice(line).map_err(wrong)?;
    if versioned.version > VERSION {
        return Err(Error::usage(format!(
            "this VM's process speaks version {VERSION} of the control protocol, the request {}",
            versioned.version
        ))
        .help("use the pavo that started the cluster"));
    }
    Ok(serde_json::from_slice::<Request>(line).map_err(wrong)?.op)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    #[tokio::test]
    async fn what_was_given_up_is_told_from_what_is_waited_for() {
        let (mut asks, mut hears) = tokio::io::duplex(64);
        let mut ahead = None;
        asks.write_all(b"one\n").await.unwrap();
        assert_eq!(line(&mut hears, None).await.unwrap(), b"one");
        assert!(!given_up(&mut hears, &mut ahead).await);
        // Who asks for more at once loses nothing of it.
        asks.write_all(b"two\nthree\n").await.unwrap();
        assert_eq!(line(&mut hears, ahead.take()).await.unwrap(), b"two");
        assert!(!given_up(&mut hears, &mut ahead).await);
        assert_eq!(line(&mut hears, ahead.take()).await.unwrap(), b"three");
        asks.write_all(b"reset\n").await.unwrap();
        drop(asks);
        assert_eq!(line(&mut hears, None).await.unwrap(), b"reset");
        assert!(given_up(&mut hears, &mut ahead).await);
    }
}
