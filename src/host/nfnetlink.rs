//! Deletes tables of nftables by a message to the kernel.
//!
//! A batch is one transaction: all of it happens, or nothing. The kernel answers each
//! message of it that asks for an answer, then.

use std::io;
use std::path::Path;

use nix::libc;
use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
use nix::sys::time::{TimeVal, TimeValLike};
use rtnetlink::sys::Socket;

use super::netns;
use super::nft::Family;
use super::step::Outcome;
use crate::error::{Context, Error, Result};

/// How long the kernel may take to answer.
const LIMIT_SECONDS: i64 = 30;

const NETLINK_NETFILTER: isize = 12;
/// The part of it that is nftables.
const NFTABLES: u16 = 10;

/// Types of messages: the beginning and the end of a batch, a table to delete, an answer.
const BEGIN: u16 = 0x10;
const END: u16 = 0x11;
const DELETE_TABLE: u16 = NFTABLES << 8 | 2;
const ANSWER: u16 = 2;

/// The one attribute of a table: its name.
const NAME: u16 = 1;

const REQUEST: u16 = 1;
const ANSWERED: u16 = 4;

/// Header of a message, and what every message of netfilter has behind it.
const HEADER: usize = 16;
const BEGIN_SEQUENCE: u32 = 0;

/// A table: its family and name.
type Name = (Family, String);

/// Deletes those of these tables that are there, in one transaction, in the namespace with
/// this file or the caller's own.
pub async fn delete_tables(namespace: Option<&Path>, tables: Vec<Name>) -> Result<Outcome> {
    let opened = match namespace {
        Some(path) => netns::with_netns(path, || Socket::new(NETLINK_NETFILTER))?,
        None => Socket::new(NETLINK_NETFILTER),
    };
    let socket = opened.while_doing(|| "opening a netfilter socket".into())?;
    let limit = TimeVal::seconds(LIMIT_SECONDS);
    setsockopt(&socket, ReceiveTimeout, &limit).while_doing(|| "limiting its patience".into())?;
    let asking = tokio::task::spawn_blocking(move || {
        let answer = delete_present(&socket, tables);
        // Closing it takes until all CPUs have let go of the tables, some 15 ms: others
        // need not wait for that.
        drop(tokio::task::spawn_blocking(move || drop(socket)));
        answer
    });
    let answer = asking.await.map_err(io::Error::other).and_then(|answer| answer);
    if answer.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
        let error = format!("the kernel did not answer on netfilter for {LIMIT_SECONDS} s");
        return Err(Error::system(error).help("`dmesg` on this host may say why"));
    }
    answer.while_doing(|| "asking".into())
}

/// A batch with a table that is not there deletes none: it says which.
fn delete_present(socket: &Socket, mut tables: Vec<Name>) -> io::Result<Outcome> {
    while !tables.is_empty() {
        let absent = ask(socket, &tables)?;
        if absent.is_empty() {
            return Ok(Outcome::Changed);
        }
        let mut number = 0;
        tables.retain(|_| {
            number += 1;
            !absent.contains(&number)
        });
    }
    Ok(Outcome::AlreadySo)
}

/// Asks for one transaction; returns which of the tables, counted from 1, are not there.
fn ask(socket: &Socket, tables: &[Name]) -> io::Result<Vec<u32>> {
    let last = tables.len() as u32;
    let mut batch = message(BEGIN, REQUEST, BEGIN_SEQUENCE, (0, NFTABLES), None);
    for ((family, name), number) in tables.iter().zip(1..) {
        let kind = (family.number(), 0);
        batch.extend(message(DELETE_TABLE, REQUEST | ANSWERED, number, kind, Some(name)));
    }
    batch.extend(message(END, REQUEST, last + 1, (0, NFTABLES), None));
    socket.send(&batch, 0)?;

    let mut absent = Vec::new();
    loop {
        let (answers, _) = socket.recv_from_full()?;
        for (number, error) in parse(&answers)? {
            match error {
                0 => {}
                libc::ENOENT if number != BEGIN_SEQUENCE => absent.push(number),
                error => return Err(io::Error::from_raw_os_error(error)),
            }
            if number == last {
                return Ok(absent);
            }
        }
    }
}

/// A message, padded; `(family, resource)` is what every message of netfilter begins with.
fn message(
    kind: u16,
    flags: u16,
    sequence: u32,
    (family, resource): (u8, u16),
    name: Option<&str>,
) -> Vec<u8> {
    let mut body = vec![family, 0];
    body.extend(resource.to_be_bytes());
    if let Some(name) = name {
        // Length, type, the name and the zero at its end.
        body.extend((name.len() as u16 + 5).to_ne_bytes());
        body.extend(NAME.to_ne_bytes());
        body.extend(name.as_bytes());
        body.push(0);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    let mut message = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend(sequence.to_ne_bytes());
    message.extend([0; 4]);
    message.extend(body);
    message
}

/// The answers in a datagram: to which message, with which error number or 0.
fn parse(mut bytes: &[u8]) -> io::Result<Vec<(u32, i32)>> {
    let mut answers = Vec::new();
    while !bytes.is_empty() {
        let word = |at: usize| -> io::Result<[u8; 4]> {
            let found = bytes.get(at..at + 4).and_then(|found| found.try_into().ok());
            found.ok_or_else(|| io::Error::other("the kernel's answer is cut off"))
        };
        let length = u32::from_ne_bytes(word(0)?) as usize;
        let [kind, kind_too, ..] = word(4)?;
        if u16::from_ne_bytes([kind, kind_too]) == ANSWER {
            let sequence = u32::from_ne_bytes(word(8)?);
            answers.push((sequence, -i32::from_ne_bytes(word(HEADER)?)));
        }
        bytes = bytes.get(length.next_multiple_of(4).max(HEADER)..).unwrap_or_default();
    }
    Ok(answers)
}
