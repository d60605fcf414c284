//! A request, as it comes.

use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::{MAX_REQUEST, Op, Request, VERSION};
use crate::error::{Error, Result};

/// A line, without reading past it: what follows may be the console's.
pub(super) async fn line(stream: &mut (impl AsyncRead + Unpin)) -> Option<Vec<u8>> {
    rest_of_line(stream, &mut Vec::new()).await
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
