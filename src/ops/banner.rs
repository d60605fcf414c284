//! Whether a guest's ssh server answers: by its banner, and nothing less.
//!
//! A connection that a guest takes costs it a process, which goes on starting when nobody
//! waits for it any more; and OpenSSH turns everybody away, the user too, from ten
//! connections that have not logged in (`MaxStartups`). A guest that is slow must therefore
//! be asked seldom and waited for long. It takes no haste to find one that has just come up:
//! whoever carries connections to guests (`network::responder`) ends those that a guest
//! refuses, and sends anew what one that boots has lost.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

/// How to ask.
#[derive(Clone, Copy, Debug)]
struct Asking {
    /// After how long to try again where nobody is there.
    retry: Duration,
    /// After how long without an answer to try once more beside: a guest that was reset
    /// knows nothing of the connections it had.
    beside: Duration,
    /// How long one try may take.
    patience: Duration,
}

const SSH: Asking = Asking {
    retry: Duration::from_millis(50),
    beside: Duration::from_secs(10),
    patience: Duration::from_secs(60),
};

/// Tries under way at once: with those that a slow guest has not seen end, few enough that
/// the user is let in.
const TRIES: usize = 3;

/// Returns once the server at `address` has sent `SSH-`, however slow its guest is.
pub async fn answers(address: SocketAddr) {
    answer(address, SSH).await;
}

/// The same, where what is in between is no responder of ours: it may sit on a connection
/// that the guest never saw.
pub async fn answers_through(address: SocketAddr, beside: Duration) {
    answer(address, Asking { beside, ..SSH }).await;
}

async fn answer(address: SocketAddr, asking: Asking) {
    let one = || timeout(asking.patience, banner(address));
    let mut tries = FuturesUnordered::new();
    loop {
        if tries.len() < TRIES {
            tries.push(one());
        }
        tokio::select! {
            Some(said) = tries.next() => match said {
                Ok(true) => return,
                _ => sleep(asking.retry).await,
            },
            () = sleep(asking.beside) => {}
        }
    }
}

async fn banner(address: SocketAddr) -> bool {
    let mut start = [0; 4];
    match TcpStream::connect(address).await {
        Ok(mut stream) => stream.read_exact(&mut start).await.is_ok() && &start == b"SSH-",
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;

    /// A server that answers connections one after the other, each after `slow`, but the
    /// first `mute` never; and how many it took.
    async fn slow_server(slow: Duration, mute: usize) -> (SocketAddr, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let taken = Arc::new(AtomicUsize::new(0));
        let count = taken.clone();
        tokio::spawn(async move {
            let mut silent = Vec::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                if count.fetch_add(1, Ordering::Relaxed) < mute {
                    silent.push(stream);
                    continue;
                }
                sleep(slow).await;
                // The client may have gone: that is what this is about.
                let _ = stream.write_all(b"SSH-2.0-slow\r\n").await;
            }
        });
        (address, taken)
    }

    /// A hundredth of what holds, so that the test does not take a minute.
    const HASTY: Asking = Asking {
        retry: Duration::from_millis(1),
        beside: Duration::from_millis(100),
        patience: Duration::from_millis(600),
    };

    #[tokio::test]
    async fn a_slow_guest_is_waited_for_and_asked_once() {
        let (address, taken) = slow_server(HASTY.beside / 2, 0).await;
        timeout(Duration::from_secs(10), answer(address, HASTY)).await.unwrap();
        assert!(taken.load(Ordering::Relaxed) <= 2);
    }

    /// Ten at once keep the user out, and a guest whose processes take a minute to start
    /// has all of the last minute's at once.
    #[tokio::test]
    async fn a_guest_that_takes_connections_and_says_nothing_has_room_for_its_user() {
        let (address, taken) = slow_server(Duration::ZERO, usize::MAX).await;
        let asked = timeout(HASTY.patience * 3, answer(address, HASTY)).await;
        assert!(asked.is_err(), "it never answers");
        let taken = taken.load(Ordering::Relaxed);
        assert!(taken <= 4 * TRIES, "{taken} connections");
    }

    #[tokio::test]
    async fn a_guest_that_forgot_its_connections_is_found_again() {
        let (address, _) = slow_server(Duration::ZERO, TRIES - 1).await;
        timeout(HASTY.patience, answer(address, HASTY)).await.unwrap();
    }

    #[tokio::test]
    async fn what_refuses_is_asked_until_somebody_is_there() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let serve = async {
            sleep(HASTY.beside * 2).await;
            let listener = TcpListener::bind(address).await.unwrap();
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"SSH-2.0-late\r\n").await.unwrap();
            stream
        };
        let both = async { tokio::join!(serve, answer(address, SSH)) };
        timeout(Duration::from_secs(5), both).await.unwrap();
    }
}
