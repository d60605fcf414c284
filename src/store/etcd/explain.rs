//! What etcd's errors mean: whether to try again, and what to tell people.

use etcd_client::Error as EtcdError;

use super::Login;
use crate::error::Error;

/// What to do about a failed request.
pub enum Verdict {
    /// The token is no longer good, and nothing was done: log in again.
    LogIn,
    /// Another attempt may succeed, here or elsewhere.
    Again {
        /// Whether etcd may have done what was asked.
        perhaps_done: bool,
        reason: String,
    },
    /// etcd has answered.
    Final(Error),
}

/// The codes of gRPC that etcd uses.
mod code {
    pub const CANCELLED: i32 = 1;
    pub const UNKNOWN: i32 = 2;
    pub const INVALID: i32 = 3;
    pub const DEADLINE: i32 = 4;
    pub const NOT_FOUND: i32 = 5;
    pub const DENIED: i32 = 7;
    pub const EXHAUSTED: i32 = 8;
    pub const PRECONDITION: i32 = 9;
    pub const OUT_OF_RANGE: i32 = 11;
    pub const INTERNAL: i32 = 13;
    pub const UNAVAILABLE: i32 = 14;
    pub const UNAUTHENTICATED: i32 = 16;
}

/// Code and text of what etcd, or the transport, answered.
fn status(error: &EtcdError) -> Option<(i32, &str)> {
    match error {
        EtcdError::GRpcStatus(status) => Some((status.code().into(), status.message())),
        _ => None,
    }
}

pub fn says(error: &EtcdError, text: &str) -> bool {
    status(error).is_some_and(|(_, message)| message.contains(text))
}

pub fn is_lease_over(error: &EtcdError) -> bool {
    match error {
        EtcdError::LeaseKeepAliveError(reason) => reason == "lease not found",
        _ => says(error, "requested lease not found"),
    }
}

pub fn is_too_large(error: &EtcdError) -> bool {
    status(error).is_some_and(|(code, _)| code == code::OUT_OF_RANGE)
        && says(error, "message length too large")
}

pub fn is_compacted(error: &EtcdError) -> bool {
    says(error, "required revision has been compacted")
}

/// Judges an error of a request that `login` made.
pub fn judge(error: EtcdError, login: &Login) -> Verdict {
    let again = |perhaps_done, reason| Verdict::Again { perhaps_done, reason };
    let Some((code, message)) = status(&error) else {
        return match &error {
            EtcdError::TransportError(_) | EtcdError::IoError(_) => again(true, causes(&error)),
            EtcdError::WatchError(_) | EtcdError::LeaseKeepAliveError(_) => {
                again(true, error.to_string())
            }
            _ => Verdict::Final(Error::bug("the etcd client refused a request").because(error)),
        };
    };
    match code {
        code::UNAUTHENTICATED if message.contains("invalid auth token") => Verdict::LogIn,
        code::INVALID if message.contains("revision of auth store is old") => Verdict::LogIn,
        // Refused before anything was proposed.
        code::EXHAUSTED if message.contains("too many requests") => again(false, text(message)),
        code::UNAVAILABLE if message.contains("no leader") => again(false, text(message)),
        code::UNAVAILABLE | code::DEADLINE | code::CANCELLED => again(true, causes(&error)),
        code::UNKNOWN | code::INTERNAL if !message.starts_with("etcdserver: ") => {
            again(true, causes(&error))
        }
        _ => Verdict::Final(answer(code, message, login).because(error_text(code, message))),
    }
}

/// An answer that stays the same however often one asks.
fn answer(code: i32, message: &str, login: &Login) -> Error {
    match code {
        code::EXHAUSTED if message.contains("space exceeded") => {
            Error::system("etcd is full: its space quota is used up (alarm NOSPACE)").help(
                "it reads and deletes, but writes nothing new: an administrator of etcd compacts \
                 (`etcdctl compact`), then `etcdctl defrag` and `etcdctl alarm disarm`",
            )
        }
        code::NOT_FOUND if message.contains("lease not found") => {
            Error::not_found("the lease has run out")
        }
        code::DENIED => denied(login),
        code::INVALID if message.contains("user name is empty") => {
            Error::system("etcd asks for a log-in, and none is configured")
                .help("set a certificate or a password file for etcd in the site's configuration")
        }
        code::INVALID | code::UNAUTHENTICATED if message.contains("authentication failed") => {
            refused_login(login)
        }
        code::PRECONDITION if message.contains("authentication is not enabled") => {
            Error::system("etcd has no authentication yet")
                .help("an administrator prepares it: `pavo internal setup store`")
        }
        _ => Error::system("etcd refused the request"),
    }
}

/// The error of what etcd does not permit.
pub fn denied(login: &Login) -> Error {
    let who = match login {
        Login::Password { user, .. } => format!("the user `{user}`"),
        Login::Certificate { cert, .. } => format!("the user that `{}` names", cert.display()),
        Login::None => "an unknown user".into(),
    };
    Error::system(format!("etcd does not permit this to {who}"))
        .help("see which roles it has: `etcdctl user get --detail USER`; an administrator repairs ours: `pavo internal setup store`")
}

fn refused_login(login: &Login) -> Error {
    match login {
        Login::Password { user, .. } => {
            Error::system(format!("etcd refused the log-in of `{user}`"))
                .help("the user does not exist there, or has another password: compare the password file with the one that etcd was given")
        }
        _ => Error::system("etcd refused the log-in")
            .help("check whose certificate is used: its common name has to be a user of etcd"),
    }
}

fn error_text(code: i32, message: &str) -> String {
    format!("{} (gRPC code {code})", text(message))
}

fn text(message: &str) -> String {
    message.trim_start_matches("etcdserver: ").to_owned()
}

/// The error with its causes, in one line: gRPC wraps the interesting one.
fn causes(error: &EtcdError) -> String {
    let mut parts: Vec<String> = Vec::new();
    let first: &dyn std::error::Error = match error {
        EtcdError::GRpcStatus(status) => {
            parts.push(text(status.message()));
            status
        }
        EtcdError::TransportError(error) => error,
        other => other,
    };
    let mut cause = if parts.is_empty() { Some(first) } else { first.source() };
    while let Some(error) = cause {
        parts.push(error.to_string());
        cause = error.source();
    }
    let all = parts.clone();
    // Each layer repeats what the next one says.
    let mut numbered = 0..;
    parts.retain(|part| {
        let later = numbered.next().map_or(0, |number: usize| number + 1);
        !part.is_empty() && part != "transport error" && !all[later..].contains(part)
    });
    parts.join(": ")
}
