//! The words in which rules are written: nftables objects as JSON values.
//!
//! See libnftables-json(5). `family` and `table` are left out: the step adds them.

use serde::Serialize;
use serde_json::{Value, json};

/// Ends the chain of its table for this packet, which goes on.
pub fn accept() -> Value {
    json!({ "accept": null })
}

/// Ends the packet's life.
pub fn drop() -> Value {
    json!({ "drop": null })
}

/// Goes on in another chain and does not come back.
pub fn goto(chain: &str) -> Value {
    json!({ "goto": { "target": chain } })
}

/// Goes on in another chain, and here with the next rule if that comes [`back`].
pub fn jump(chain: &str) -> Value {
    json!({ "jump": { "target": chain } })
}

/// Ends a chain that was jumped to.
pub fn back() -> Value {
    json!({ "return": null })
}

/// A named counter.
pub fn counter(name: &str) -> Value {
    json!({ "counter": { "name": name } })
}

/// A named limit of packets a second, and at once.
pub fn limit(name: &str, rate: u32, burst: u32) -> Value {
    json!({ "limit": { "name": name, "rate": rate, "per": "second", "burst": burst } })
}

/// Counts the packet in the named counter.
pub fn count(name: &str) -> Value {
    json!({ "counter": name })
}

/// A chain that others go to.
pub fn chain(name: &str) -> Value {
    json!({ "chain": { "name": name } })
}

/// A chain the kernel calls at `hook`, for chains of type `filter` or `nat`. What
/// passes it unjudged gets `policy`.
pub fn hook(kind: &str, hook: &str, priority: i32, policy: &str) -> Value {
    let name = if kind == "filter" { hook.to_owned() } else { format!("{kind}-{hook}") };
    json!({ "chain": {
        "name": name, "type": kind, "hook": hook, "prio": priority, "policy": policy,
    } })
}

/// A rule: matches and statements, from left to right.
pub fn rule(chain: &str, words: &[Value]) -> Value {
    json!({ "rule": { "chain": chain, "expr": words } })
}

/// A set of tuples of these types.
pub fn set(name: &str, types: &[&str], elements: &[Value]) -> Value {
    let types = if let [one] = types { json!(one) } else { json!(types) };
    filled("set", json!({ "name": name, "type": types }), elements)
}

/// A map from keys of a type to verdicts (`to` is `verdict`) or named objects.
pub fn map(name: &str, from: &str, to: &str, elements: &[(Value, Value)]) -> Value {
    filled("map", json!({ "name": name, "type": from, "map": to }), elements)
}

/// nft takes no empty list of elements, but takes none at all. Told how many there are, the
/// kernel takes a table of that size, which is looked into faster than one that may grow.
fn filled(kind: &str, mut object: Value, elements: &[impl Serialize]) -> Value {
    if !elements.is_empty() {
        object["elem"] = json!(elements);
        object["size"] = json!(elements.len());
    }
    json!({ kind: object })
}

/// Several values side by side: an element of a set, or a key to look up in one.
pub fn tuple(values: &[Value]) -> Value {
    json!({ "concat": values })
}

/// A property of the packet that is not in it, such as `iifname`.
pub fn meta(key: &str) -> Value {
    json!({ "meta": { "key": key } })
}

/// A header field.
pub fn field(protocol: &str, field: &str) -> Value {
    json!({ "payload": { "protocol": protocol, "field": field } })
}

/// Bits of the packet, counted from the start of the `base` header.
pub fn raw(base: &str, offset: u32, length: u32) -> Value {
    json!({ "payload": { "base": base, "offset": offset, "len": length } })
}

/// Some of the bits of a number.
pub fn masked(value: Value, mask: u32) -> Value {
    json!({ "&": [value, mask] })
}

/// Writes a header field.
pub fn write(field: Value, value: impl Serialize) -> Value {
    json!({ "mangle": { "key": field, "value": value } })
}

/// Matches when both are equal; a set on the right, written `@name`, when it holds
/// the left.
pub fn eq(left: Value, right: impl Serialize) -> Value {
    json!({ "match": { "op": "==", "left": left, "right": right } })
}

/// Matches when they differ. Beware: a field that a packet is too short for
/// matches neither [`eq`] nor this.
pub fn ne(left: Value, right: impl Serialize) -> Value {
    json!({ "match": { "op": "!=", "left": left, "right": right } })
}

/// A match on any of these values.
pub fn any(values: &[&str]) -> Value {
    json!({ "set": values })
}

/// Matches packets of connections that were let through before, and errors about
/// them.
pub fn is_reply() -> Value {
    json!({ "match": {
        "op": "in", "left": { "ct": { "key": "state" } }, "right": ["established", "related"],
    } })
}

/// Matches addresses of a network, in a field.
pub fn within(left: Value, subnet: crate::model::address::Subnet) -> Value {
    eq(left, json!({ "prefix": { "addr": subnet.network(), "len": subnet.bits() } }))
}
