//! What other processes say: QEMU, Slurm's plugin, pavo's own processes on other hosts.

use std::time::Duration;

use pavo::ops::setup::ask::Ask;
use pavo::vm::control::Op;
use pavo::vm::link::{Bootstrap, Receiver, ToLauncher, ToTask};
use pavo::vm::qmp;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// QEMU's side of QMP.
pub fn qmp(data: &[u8]) -> bool {
    super::block_on(async {
        let stream = super::said(data).await;
        let patience = Duration::from_secs(5);
        let connected = qmp::connect(stream, patience).await;
        let Ok((client, mut events)) = connected else { return false };
        let answer = client.call("query-status", serde_json::json!({})).await;
        while let Ok(event) = events.try_recv() {
            let _: Option<serde_json::Value> = event.data();
        }
        answer.is_ok()
    })
}

pub fn qmp_seeds() -> Vec<Vec<u8>> {
    let greeting = r#"{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}}}"#;
    let event = r#"{"event": "STOP", "data": {"a": 1}, "timestamp": {"seconds": 1}}"#;
    let exchange = |last: &str| {
        let first = r#"{"return": {}, "id": 0}"#;
        format!("{greeting}\r\n{first}\r\n{event}\r\n{last}\r\n").into_bytes()
    };
    vec![
        exchange(r#"{"return": {"running": true, "status": "running"}, "id": 1}"#),
        exchange(r#"{"error": {"class": "GenericError", "desc": "no"}, "id": 1}"#),
        exchange(r#"{"return": [], "id": 18446744073709551616}"#),
    ]
}

/// What Slurm's plugin asks root for.
pub fn ask(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let Ok(ask) = Ask::parse(text) else { return false };
    assert_ne!(ask.uid, 0);
    assert!(!ask.node.contains('/') && ask.node != "..");
    assert!(ask.ranks.iter().all(|rank| ask.set_of(*rank).is_some()), "{text}");
    true
}

pub fn ask_seeds() -> Vec<Vec<u8>> {
    let one = "version=1\njob=42\nstep=0\nrestart=0\nuid=1000\ngid=1000\nnode=n1\nnode_id=0\n\
               nodes=2\nnode_list=n[1-2]\ntasks=4\nlocal_tasks=0,1\nvm=eth:3,other:1\nkeeper=77\n";
    let sealed = format!("{one}sealed=AAAA\nlimit=60\nunknown=1\n");
    vec![one.into(), sealed.into()]
}

/// A line of any kind between pavo's processes: what is read can be said again.
pub fn messages(data: &[u8]) -> bool {
    /// How many there are at the beginning of `data`.
    fn reads<T: DeserializeOwned + Serialize>(data: &[u8]) -> usize {
        super::block_on(async {
            let mut receiver = Receiver::new(data);
            let mut count = 0;
            while let Ok(Some(message)) = receiver.receive::<T>().await {
                let again = serde_json::to_vec(&message).unwrap();
                assert!(serde_json::from_slice::<T>(&again).is_ok());
                count += 1;
            }
            count
        })
    }
    let count = reads::<ToLauncher>(data) + reads::<ToTask>(data) + reads::<Op>(data);
    let Ok(line) = std::str::from_utf8(data) else { return count > 0 };
    let Ok(bootstrap) = serde_json::from_str::<Bootstrap>(line) else { return count > 0 };
    serde_json::from_str::<Bootstrap>(&bootstrap.line()).unwrap();
    true
}

pub fn messages_seeds() -> Vec<Vec<u8>> {
    let lines = [
        r#"{"hello":{"version":1,"rank":0,"node":0,"host":"n1","cores":2,"memory_mib":512,"nics":[],"published":[],"control":null}}"#,
        r#"{"report":{"vm":0,"state":"running"}}"#,
        r#"{"refused":{"error":{"kind":"usage","message":"no","causes":[],"help":[]}}}"#,
        r#"{"stop":{"stop":"graceful","seconds":5}}"#,
        r#"{"version":1,"op":"console","replay":100}"#,
        r#"{"op":"qmp","command":"query-status","arguments":{"a":[1]}}"#,
        r#"{"version":1,"addresses":["127.0.0.1:80","[::1]:80"]}"#,
    ];
    lines.map(|line| format!("{line}\n").into_bytes()).into()
}
