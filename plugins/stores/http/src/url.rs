//! The address of an image.

use tenon_sdk::store::{Error, Result};

/// An address, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    /// Whether the host of the plugin is to speak TLS.
    pub tls: bool,
    /// The server's name or address, as written.
    pub host: String,
    /// The server's port.
    pub port: u16,
    /// What the request's `Host` field says.
    pub authority: String,
    /// What is asked for.
    pub path: String,
}

impl Url {
    /// The address that a server means by a text in its `Location` field, if it is one of HTTP.
    #[must_use]
    pub fn join(&self, location: &str) -> Option<String> {
        let whole = if location.starts_with('/') && !location.starts_with("//") {
            format!("{}://{}{location}", if self.tls { "https" } else { "http" }, self.authority)
        } else {
            location.to_owned()
        };
        Self::parse(&whole).ok().map(|_| whole)
    }

    /// Takes an address apart.
    ///
    /// # Errors
    /// It is none of HTTP, or has what does not belong there.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong =
            |what: &str| Error::Invalid(format!("`url` {what}; give http://HOST[:PORT]/PATH or https://…"));
        let (scheme, rest) =
            text.split_once("://").ok_or_else(|| wrong("has no `http://` or `https://` before its host"))?;
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            _ => return Err(wrong("is neither of http nor of https")),
        };
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) || text.len() > 4096 {
            return Err(wrong("has blanks or letters that must be written as %XX, or is too long"));
        }
        let rest = rest.split('#').next().unwrap_or_default();
        let begin = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(begin);
        if authority.contains('@') {
            return Err(wrong("has a name or password, which this store cannot send"));
        }
        let default = if tls { 443 } else { 80 };
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => {
                let port = Some(port).filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()));
                (
                    host,
                    port.and_then(|port| port.parse().ok())
                        .ok_or_else(|| wrong("has a port that is none"))?,
                )
            }
            _ => (authority, default),
        };
        if host.is_empty() {
            return Err(wrong("has no host"));
        }
        let slash = if path.starts_with('/') { "" } else { "/" };
        Ok(Self {
            tls,
            host: host.to_owned(),
            port,
            authority: authority.to_owned(),
            path: format!("{slash}{path}"),
        })
    }
}
