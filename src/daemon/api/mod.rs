//! The daemon's answers: HTTP and JSON.
//!
//! `openapi.yaml` beside this file is the contract; a test holds the routes to it, and another
//! asks the daemon whatever the contract allows and much that it does not. Every error is a
//! [`WireError`](crate::error::WireError).
//!
//! - [`records`]: nodes, groups, profiles, networks, passwords, projects;
//! - [`operations`]: long work, and what came of it;
//! - [`system`]: what the daemon tells of itself.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, to_bytes};
use axum::extract::{FromRequest, FromRequestParts, MatchedPath, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Router, middleware};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Shared;
use super::caller::{Caller, Rights};
use crate::error::{Error, Kind};

mod operations;
mod records;
mod system;

/// The longest body that says what is to be done.
const MAX_ASKED: usize = 1 << 20;

/// How long an answer may take. What was begun goes on.
const PATIENCE: Duration = Duration::from_secs(120);

/// A path, and what answers there.
type Route = (&'static str, MethodRouter<Arc<Shared>>);

/// All routes.
fn routes() -> Vec<Route> {
    use {operations as o, records as r};
    vec![
        ("/v1/{kind}", get(r::list).post(r::create).patch(r::update).delete(r::delete)),
        ("/v1/{kind}/import", post(r::import)),
        ("/v1/{kind}/export", get(r::export).post(r::opened)),
        ("/v1/ops", get(o::list).post(o::begin)),
        ("/v1/ops/{id}", get(o::show)),
        ("/v1/ops/{id}/results", get(o::results)),
        ("/v1/ops/{id}/retry", post(o::retry)),
        ("/v1/ops/{id}/abort", post(o::abort)),
        ("/v1/services", get(system::services)),
        ("/v1/health", get(system::health)),
        ("/v1/openapi.json", get(system::openapi)),
        ("/metrics", get(system::metrics)),
    ]
}

/// All there is to be asked.
pub(super) fn router(shared: Arc<Shared>) -> Router {
    let mut router = Router::new();
    for (path, answers) in routes() {
        router = router.route(path, answers.fallback(no_method));
    }
    router
        .fallback(nothing)
        .layer(middleware::from_fn_with_state(shared.clone(), watched))
        .with_state(shared)
}

async fn nothing() -> Refusal {
    Refusal(StatusCode::NOT_FOUND, Error::not_found("there is nothing at this path"))
}

async fn no_method() -> Refusal {
    let error = Error::usage("this path does not take this method");
    Refusal(StatusCode::METHOD_NOT_ALLOWED, error)
}

/// Refuses who may not, and counts and logs what others ask.
async fn watched(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let caller = request.extensions().get::<Caller>().cloned();
    let looks = matches!(method, Method::GET | Method::HEAD | Method::OPTIONS);
    let answer = match &caller {
        None => unknown(),
        Some(caller) if !looks && caller.rights != Rights::Change => forbidden(caller),
        Some(_) => match tokio::time::timeout(PATIENCE, next.run(request)).await {
            Ok(answer) => answer,
            Err(_) => late(),
        },
    };
    let (status, took) = (answer.status(), begun.elapsed());
    let route = route.as_deref().unwrap_or("other");
    shared.metrics.asked(method.as_str(), route, status.as_u16(), took);
    if !looks || status.is_server_error() {
        let caller = caller.as_ref().map_or("nobody", |caller| &caller.name);
        let milliseconds = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        let status = status.as_u16();
        tracing::info!(caller, %method, path = route, status, milliseconds, "answered");
    }
    answer
}

fn unknown() -> Response {
    let error = Error::system("the daemon does not know you").help(
        "show a token, `Authorization: Bearer …`; an administrator makes one: `pavo daemon token \
         create NAME`",
    );
    let mut answer = Refusal(StatusCode::UNAUTHORIZED, error).into_response();
    answer.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    answer
}

fn forbidden(caller: &Caller) -> Response {
    let error = Error::system(format!("`{}` may look, and change nothing", caller.name)).help(
        "the members of the daemon's `admin-group` may, and whose token was made without \
         `--read-only`",
    );
    Refusal(StatusCode::FORBIDDEN, error).into_response()
}

fn late() -> Response {
    let error = Error::system("it takes longer than an answer may; what was begun goes on")
        .help("see how it went: `pavo op list`");
    Refusal(StatusCode::GATEWAY_TIMEOUT, error).into_response()
}

/// Why not.
#[derive(Debug)]
struct Refusal(StatusCode, Error);

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let status = match error.kind() {
            Kind::Usage | Kind::Config => StatusCode::BAD_REQUEST,
            Kind::NotFound => StatusCode::NOT_FOUND,
            Kind::Bug => StatusCode::INTERNAL_SERVER_ERROR,
            Kind::System | Kind::Partial | Kind::FailLimit | Kind::Interrupted => {
                StatusCode::SERVICE_UNAVAILABLE
            }
        };
        Self(status, error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Answer(self.1.to_wire())).into_response()
    }
}

/// JSON that is answered.
#[derive(Debug)]
struct Answer<T>(T);

impl<T: Serialize> IntoResponse for Answer<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(body) => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
            Err(error) => {
                Refusal::from(Error::bug("an answer is no JSON").because(error)).into_response()
            }
        }
    }
}

/// JSON that was asked.
#[derive(Debug)]
struct Asked<T>(T);

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for Asked<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &S) -> Result<Self, Refusal> {
        let kind = request.headers().get(header::CONTENT_TYPE).and_then(|it| it.to_str().ok());
        let kind = kind.and_then(|it| it.split(';').next()).map(str::trim);
        if kind != Some("application/json") {
            let error = Error::usage("a body is `application/json`");
            return Err(Refusal(StatusCode::UNSUPPORTED_MEDIA_TYPE, error));
        }
        let body = body(request.into_body(), MAX_ASKED).await?;
        let read = serde_json::from_slice(&body);
        Ok(Self(
            read.map_err(|error| Error::usage("the body is not as it should be").because(error))?,
        ))
    }
}

/// A body, unless it is longer.
async fn body(body: Body, most: usize) -> Result<Vec<u8>, Refusal> {
    let bytes = to_bytes(body, most).await.map_err(|error| {
        let what = format!("the body has more than {most} bytes, or broke off");
        Refusal(StatusCode::PAYLOAD_TOO_LARGE, Error::usage(what).because(error))
    })?;
    Ok(bytes.into())
}

/// What the query of a path says.
#[derive(Debug)]
struct Query<T>(T);

impl<S: Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        let read = serde_urlencoded::from_str(parts.uri.query().unwrap_or_default());
        Ok(Self(
            read.map_err(|error| Error::usage("the query is not as it should be").because(error))?,
        ))
    }
}

#[cfg(test)]
mod tests;
