//! `--net KIND[,KEY=VALUE…]`: a network, and the card by which the guest is on it.

use std::str::FromStr;

use anyhow::{Result, anyhow, bail};
use tenon_net::NetworkError;
use tenon_plugins::Plugin;

use crate::Usage;
use crate::args::PluginSpec;
use crate::disks::{DEVICE, taken};

/// The plugin that shows a network port to the guest, if the command line names no other.
const NETWORK: &str = "virtio-net";

/// A network card as written on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetworkSpec {
    pub(crate) network: tenon_net::Spec,
    /// The card, with the settings that are not the network's.
    pub(crate) card: PluginSpec,
}

impl FromStr for NetworkSpec {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let mut card = PluginSpec { plugin: NETWORK.into(), settings: Vec::new() };
        let mut words = Vec::new();
        for word in text.split(',') {
            match word.split_once('=') {
                Some((DEVICE, plugin)) if !plugin.is_empty() => card.plugin = plugin.into(),
                Some((key, value)) if !words.is_empty() && key != DEVICE && !tenon_net::is_setting(key) => {
                    card.settings.push((key.into(), value.into()));
                }
                _ => words.push(word),
            }
        }
        Ok(Self { network: tenon_net::parse(&words.join(","))?, card })
    }
}

impl NetworkSpec {
    /// Refuses a setting that neither the network nor this card has, and a port that nobody would know.
    pub(crate) fn check(&self, card: &Plugin) -> Result<()> {
        if let tenon_net::Kind::User { forwards, .. } = &self.network.kind
            && forwards.iter().any(|forward| forward.host.port() == 0)
        {
            bail!(Usage(anyhow!(
                "--net: `forward` from port 0, which would be any; name a port of this host"
            )));
        }
        let config = &card.manifest().config;
        let Some((key, _)) = self.card.settings.iter().find(|(key, _)| !config.contains_key(key)) else {
            return Ok(());
        };
        let of_card = taken(&card.manifest().id, config.keys().map(String::as_str));
        bail!(Usage(anyhow!(
            "--net: there is no setting `{key}`: {}; {of_card}",
            self.network.kind.settings()
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_the_networks_is_the_cards() {
        let spec: NetworkSpec = "user,queues=4,forward=2222:22,device=mine,link=down".parse().unwrap();
        assert_eq!(spec.network, tenon_net::parse("user,forward=2222:22").unwrap());
        let setting = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let settings = vec![setting("queues", "4"), setting("link", "down")];
        assert_eq!(spec.card, PluginSpec { plugin: "mine".into(), settings });
        let plain: NetworkSpec = "tap:br0".parse().unwrap();
        assert_eq!(plain.card, PluginSpec { plugin: NETWORK.into(), settings: Vec::new() });
        for text in ["", "queues=4", "user,queues", "user,device=", "user,listen=a"] {
            assert!(text.parse::<NetworkSpec>().is_err(), "{text}");
        }
    }
}
