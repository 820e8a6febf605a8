//! `GET /metrics` over HTTP, for a monitoring system. Only where the configuration says so: whoever
//! reaches the address can read it.

use std::net::SocketAddr;

use axum::{Router, http::header::CONTENT_TYPE, routing};
use tokio::net::TcpListener;

use crate::metrics::MEDIA_TYPE;

/// Why metrics cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} (metrics.listen)")]
pub struct ScrapeError {
    /// Where.
    pub address: SocketAddr,
    /// Why.
    pub source: std::io::Error,
}

/// Serves them from now on, as `text` tells them. Returns where, which `address` may leave open.
pub async fn serve(
    address: SocketAddr,
    text: impl Fn() -> String + Clone + Send + Sync + 'static,
) -> Result<SocketAddr, ScrapeError> {
    let failed = |source| ScrapeError { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let found = listener.local_addr().map_err(failed)?;
    let answer = move || async move { ([(CONTENT_TYPE, MEDIA_TYPE)], text()) };
    let routes = Router::new().route("/metrics", routing::get(answer));
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, routes).await {
            tracing::error!(%error, "metrics are served no more");
        }
    });
    Ok(found)
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
    };

    use super::*;

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn metrics_are_answered_and_nothing_else_is() {
        let any = "127.0.0.1:0".parse().unwrap();
        let address = serve(any, || "ferry_ves 1\n# EOF\n".to_owned()).await.unwrap();
        let answer = get(address, "/metrics").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains(&format!("content-type: {MEDIA_TYPE}\r\n")), "{answer}");
        assert!(answer.ends_with("ferry_ves 1\n# EOF\n"), "{answer}");
        assert!(get(address, "/").await.starts_with("HTTP/1.1 404 "));
        let error = serve(address, String::new).await.unwrap_err();
        assert!(error.to_string().contains(&address.to_string()), "{error}");
    }
}
