//! What the daemon counts, in OpenMetrics.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::error::{Context, Result};

/// How `Content-Type` calls it.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A request, as it is counted. The path is the route's: people's words are no labels.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Asked {
    method: String,
    path: String,
    status: u16,
}

/// What is counted.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<Asked, Counter>,
    seconds: Family<Asked, Histogram>,
    connections: Gauge,
    nodes: Gauge,
    leading: Gauge,
    process_start: Gauge<f64, AtomicU64>,
}

impl Metrics {
    /// Nothing yet, in a process that began at this second since 1970.
    pub fn new(begun: u64) -> Self {
        let seconds = || Histogram::new([0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0]);
        let mut all = Self {
            registry: Registry::with_prefix("pavo"),
            requests: Family::default(),
            seconds: Family::new_with_constructor(seconds),
            connections: Gauge::default(),
            nodes: Gauge::default(),
            leading: Gauge::default(),
            process_start: Gauge::default(),
        };
        #[expect(clippy::cast_precision_loss, reason = "seconds since 1970 are exact")]
        all.process_start.set(begun as f64);
        let version = ("version".to_owned(), env!("CARGO_PKG_VERSION").to_owned());
        let to = &mut all.registry;
        to.register("build", "What runs", Info::new(vec![version]));
        to.register("requests", "Requests that were answered", all.requests.clone());
        let help = "How long requests took";
        to.register_with_unit("request", help, Unit::Seconds, all.seconds.clone());
        to.register("connections", "Connections that are open", all.connections.clone());
        to.register("nodes", "Nodes in the inventory", all.nodes.clone());
        to.register("leading", "Whether this daemon is the one that writes", all.leading.clone());
        let help = "When the daemon began, since 1970";
        to.register_with_unit("start_time", help, Unit::Seconds, all.process_start.clone());
        all
    }

    /// Counts a request.
    pub fn asked(&self, method: &str, path: &str, status: u16, took: Duration) {
        let asked = Asked { method: method.into(), path: path.into(), status };
        self.seconds.get_or_create(&asked).observe(took.as_secs_f64());
        self.requests.get_or_create(&asked).inc();
    }

    pub fn connected(&self) {
        self.connections.inc();
    }

    pub fn disconnected(&self) {
        self.connections.dec();
    }

    pub fn lead(&self, leading: bool) {
        self.leading.set(i64::from(leading));
    }

    pub fn nodes(&self, count: usize) {
        self.nodes.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// All of it.
    ///
    /// # Errors
    /// Never, as far as is known.
    pub fn text(&self) -> Result<String> {
        let mut text = String::new();
        text::encode(&mut text, &self.registry).while_doing(|| "writing metrics".into())?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_told_with_its_unit_and_an_end() {
        let metrics = Metrics::new(7);
        metrics.asked("GET", "/v1/{kind}", 200, Duration::from_millis(3));
        metrics.connected();
        metrics.nodes(12);
        let text = metrics.text().unwrap();
        for line in [
            "pavo_requests_total{method=\"GET\",path=\"/v1/{kind}\",status=\"200\"} 1",
            "# UNIT pavo_request_seconds seconds",
            "pavo_nodes 12",
            "pavo_connections 1",
            "pavo_start_time_seconds 7.0",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
