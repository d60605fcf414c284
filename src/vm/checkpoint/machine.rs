//! What kind of machine a guest's memory belongs to, and whether another can have it.

use std::fs;

use serde_json::json;

use super::super::devices::Node;
use super::super::qmp;
use crate::error::{Context, Error, Result};
use crate::model::checkpoint::{Features, Machine, Processor};
use crate::model::vm::{Accel, VmSpec};

const SUCH_PROCESSORS: &str = "restart it on hosts with such processors; for clusters that move, \
                               set a `cpu-model` that all hosts have in the template";

/// What this QEMU is.
pub(super) async fn of(qmp: &qmp::Client, spec: &VmSpec, nodes: &[Node]) -> Result<Machine> {
    let asked = json!({ "path": "/machine", "property": "type" });
    let kind = qmp.call("qom-get", asked).await.while_doing(|| "asking QEMU".into())?;
    let kind = kind.as_str().unwrap_or_default();
    Ok(Machine {
        qemu: version(qmp).await?,
        kind: kind.strip_suffix("-machine").unwrap_or(kind).to_owned(),
        accel: spec.accel,
        processor: shows_host(spec).then(processor).flatten(),
        lacking: lacking(qmp).await?,
        cores: spec.cores,
        nodes: shape(nodes),
        pcocc: spec.has_pcocc_port(),
    })
}

/// What this host, or this QEMU, leaves away of the model of the guest's processors.
async fn lacking(qmp: &qmp::Client) -> Result<Vec<Features>> {
    let doing = || "asking QEMU for its guest's processors".to_owned();
    let cpus = qmp.call("query-cpus-fast", json!({})).await.while_doing(doing)?;
    let asked = json!({ "path": cpus[0]["qom-path"], "property": "filtered-features" });
    let filtered = qmp.call("qom-get", asked).await.while_doing(doing)?;
    let filtered: Vec<Features> = serde_json::from_value(filtered).while_doing(doing)?;
    Ok(filtered.into_iter().filter(|word| word.features != 0).collect())
}

/// What is left away now and was not then: `CPUID 7.0 EBX bit 16`.
fn lost(then: &[Features], now: &[Features]) -> Vec<String> {
    let bits = |word: &Features| {
        let same = |other: &&Features| {
            (&other.cpuid_register, other.cpuid_input_eax, other.cpuid_input_ecx)
                == (&word.cpuid_register, word.cpuid_input_eax, word.cpuid_input_ecx)
        };
        let before = then.iter().find(same).map_or(0, |other| other.features);
        let (lost, leaf) = (word.features & !before, word.cpuid_input_eax);
        let leaf = format!("{leaf:X}.{}", word.cpuid_input_ecx.unwrap_or_default());
        let name = format!("CPUID {leaf} {}", word.cpuid_register);
        (0..64).filter(move |bit| lost >> bit & 1 != 0).map(move |bit| format!("{name} bit {bit}"))
    };
    now.iter().flat_map(bits).collect()
}

async fn version(qmp: &qmp::Client) -> Result<[u32; 3]> {
    let answer = qmp.call("query-version", json!({})).await;
    let answer = answer.while_doing(|| "asking QEMU for its version".into())?;
    let part = |name: &str| answer["qemu"][name].as_u64().and_then(|n| u32::try_from(n).ok());
    let parts = (part("major"), part("minor"), part("micro"));
    let (Some(major), Some(minor), Some(micro)) = parts else {
        return Err(Error::system("QEMU does not tell its version"));
    };
    Ok([major, minor, micro])
}

pub(super) fn shape(nodes: &[Node]) -> Vec<(u32, u32, u64)> {
    nodes.iter().map(|node| (node.cpus.0, node.cpus.1, node.memory_mib)).collect()
}

/// Whether the guest sees the host's processor as it is.
fn shows_host(spec: &VmSpec) -> bool {
    let model = spec.cpu_model.as_deref().unwrap_or("host");
    // With KVM, `max` is the host's, too.
    spec.accel == Accel::Kvm && matches!(model.split(',').next(), Some("host" | "max"))
}

/// This host's, if Linux describes it as we know.
fn processor() -> Option<Processor> {
    parse(&fs::read_to_string("/proc/cpuinfo").ok()?)
}

fn parse(text: &str) -> Option<Processor> {
    let value = |name: &str| {
        let line = text.lines().find(|line| line.split(':').next().map(str::trim) == Some(name));
        line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned())
    };
    let flags = value("flags")?.split_whitespace().map(str::to_owned).collect();
    Some(Processor { model: value("model name")?, flags })
}

/// Refuses a host on which the guest would not find what it runs with.
///
/// # Errors
/// With the difference.
pub(super) fn check_host(spec: &VmSpec, then: &Machine) -> Result<()> {
    if spec.accel != then.accel {
        let word = |accel| match accel {
            Accel::Kvm => "with KVM",
            Accel::Tcg => "emulated",
        };
        let (then, now) = (word(then.accel), word(spec.accel));
        return Err(Error::config(format!(
            "it ran {then} when it was written down, and would run {now} here"
        ))
        .help("restart it on hosts like those it ran on; `pavo doctor` tells of KVM"));
    }
    let Some(wanted) = &then.processor else { return Ok(()) };
    let missing = |here: &Processor| -> Vec<String> {
        wanted.flags.iter().filter(|flag| !here.flags.contains(flag)).cloned().collect()
    };
    let (model, missing) = match processor() {
        Some(here) => (here.model.clone(), missing(&here)),
        None => ("unknown".into(), wanted.flags.clone()),
    };
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::config(format!(
        "CPU model: its guest has seen a `{}`, and this host's `{model}` lacks {}",
        wanted.model,
        missing.join(", ")
    ))
    .help(SUCH_PROCESSORS))
}

/// Refuses a QEMU that may not know what was written by a newer one, and one that gives the
/// guest less of a processor.
///
/// # Errors
/// With the difference.
pub(super) async fn check_qemu(qmp: &qmp::Client, then: &Machine) -> Result<()> {
    let here = version(qmp).await?;
    if here[..2] >= then.qemu[..2] {
        let lost = lost(&then.lacking, &lacking(qmp).await?);
        if lost.is_empty() {
            return Ok(());
        }
        let error = format!("CPU model: this host lacks what its guest has: {}", lost.join(", "));
        return Err(Error::config(error).help(SUCH_PROCESSORS));
    }
    let text = |version: [u32; 3]| version.map(|part| part.to_string()).join(".");
    Err(Error::config(format!(
        "it was written down by QEMU {}, and this host has {}",
        text(then.qemu),
        text(here)
    ))
    .help("restart it on hosts with this version or a newer one"))
}

/// # Errors
/// When the guest would have other processors, or its memory would be parted in another way.
pub(super) fn check_shape(cores: u32, nodes: &[Node], then: &Machine) -> Result<()> {
    if cores != then.cores {
        return Err(Error::config(format!(
            "its guest had {} cores when it was written down, and would have {cores} on this host",
            then.cores
        ))
        .help("restart it on hosts like those it ran on"));
    }
    if shape(nodes) == then.nodes {
        return Ok(());
    }
    let count = |count: usize| match count {
        0 => "no NUMA nodes".into(),
        1 => "one NUMA node".into(),
        count => format!("{count} NUMA nodes"),
    };
    Err(Error::config(format!(
        "its guest had {} when it was written down, and would have {} on this host, or of other sizes",
        count(then.nodes.len()),
        count(nodes.len())
    ))
    .help("restart it on hosts like those it ran on, or with `bind-vcpus: false` if it ran so"))
}

#[cfg(test)]
mod tests {
    use super::super::super::testing;
    use super::*;

    fn machine() -> Machine {
        let (kind, nodes, pcocc) = ("pc-q35-7.2".into(), Vec::new(), true);
        let (accel, processor, lacking) = (Accel::Tcg, None, Vec::new());
        Machine { qemu: [7, 2, 0], kind, accel, processor, lacking, cores: 2, nodes, pcocc }
    }

    #[test]
    fn a_processor_is_read_as_linux_describes_it() {
        let text = "processor\t: 0\nmodel name\t: A: 1\nflags\t\t: fpu vme\nmodel\t: 7\n\n";
        let flags = vec!["fpu".to_owned(), "vme".to_owned()];
        assert_eq!(parse(text), Some(Processor { model: "A: 1".into(), flags }));
        assert_eq!(parse("Hardware: other"), None);
        assert!(processor().is_some());
    }

    #[test]
    fn features_that_are_gone_are_named_and_those_that_never_were_are_not() {
        // As QEMU says it.
        let words = |text: &str| serde_json::from_str::<Vec<Features>>(text).unwrap();
        let then = words(
            r#"[{"cpuid-register":"EDX","cpuid-input-eax":1,"features":4},
                {"cpuid-register":"EBX","cpuid-input-eax":7,"cpuid-input-ecx":0,"features":2}]"#,
        );
        let now = words(
            r#"[{"cpuid-register":"EBX","cpuid-input-eax":7,"cpuid-input-ecx":0,"features":65538},
                {"cpuid-register":"EDX","cpuid-input-eax":1,"features":4},
                {"cpuid-register":"EAX","cpuid-input-eax":1073741825,"features":1}]"#,
        );
        assert_eq!(lost(&then, &now), ["CPUID 7.0 EBX bit 16", "CPUID 40000001.0 EAX bit 0"]);
        assert_eq!(lost(&now, &then), [""; 0]);
    }

    #[test]
    fn the_hosts_processor_is_seen_by_any_name_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = testing::spec(dir.path());
        for (accel, model, shown) in [
            (Accel::Kvm, None, true),
            (Accel::Kvm, Some("host,-avx512f"), true),
            (Accel::Kvm, Some("max"), true),
            (Accel::Kvm, Some("Skylake-Server"), false),
            (Accel::Tcg, Some("max"), false),
        ] {
            (spec.accel, spec.cpu_model) = (accel, model.map(str::to_owned));
            assert_eq!(shows_host(&spec), shown, "{model:?}");
        }
    }

    #[test]
    fn a_host_that_lacks_something_is_refused_by_what_it_lacks() {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = testing::spec(dir.path());
        check_host(&spec, &machine()).unwrap();
        spec.accel = Accel::Kvm;
        let error = check_host(&spec, &machine()).unwrap_err().to_string();
        assert!(error.contains("emulated") && error.contains("with KVM here"), "{error}");
        let mut wanted = processor().unwrap();
        let mut then = Machine { accel: Accel::Kvm, ..machine() };
        then.processor = Some(wanted.clone());
        check_host(&spec, &then).unwrap();
        wanted.flags.push("time_travel".into());
        then.processor = Some(wanted);
        let error = check_host(&spec, &then).unwrap_err().to_string();
        assert!(error.starts_with("CPU model") && error.ends_with("lacks time_travel"), "{error}");
        check_shape(2, &[], &then).unwrap();
        assert!(check_shape(4, &[], &then).unwrap_err().to_string().contains("2 cores"));
        then.nodes = vec![(0, 1, 64)];
        assert!(check_shape(2, &[], &then).unwrap_err().to_string().contains("one NUMA node"));
    }
}
