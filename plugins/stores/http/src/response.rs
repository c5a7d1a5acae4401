//! What a server answers: the head of a response, read from bytes that may be anything.

/// The longest head.
pub const LONGEST: usize = 16 << 10;

/// The head of a response, as far as this store looks at it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// The status.
    pub status: u16,
    /// How long the body is.
    pub length: Option<u64>,
    /// The first and the last byte of the body in the image, and how long that is.
    pub range: Option<(u64, u64, u64)>,
    /// The image's version as the server names it: a strong one only.
    pub etag: Option<String>,
    /// When the image was last changed.
    pub modified: Option<String>,
    /// Where the image is said to be.
    pub location: Option<String>,
    /// The connection ends with the body.
    pub closes: bool,
    /// The body is not the bytes themselves: it is in chunks, or compressed.
    pub coded: bool,
}

impl Head {
    /// Reads the head at the beginning of `bytes`, and how long it is. None if it is not all there yet.
    ///
    /// # Errors
    /// It is no head of HTTP/1, or is too long; the text says what is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, String> {
        let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
            // What cannot become a head is refused before it has grown long.
            let begin = &bytes[..bytes.len().min(5)];
            return if bytes.len() > LONGEST {
                Err(format!("the head of its response is longer than {LONGEST} bytes"))
            } else if !b"HTTP/".starts_with(begin) {
                Err("it does not speak HTTP".into())
            } else {
                Ok(None)
            };
        };
        if end > LONGEST {
            return Err(format!("the head of its response is longer than {LONGEST} bytes"));
        }
        let text = std::str::from_utf8(&bytes[..end]).map_err(|_| "the head of its response is not text")?;
        let mut lines = text.split("\r\n");
        let mut status = lines.next().unwrap_or_default().splitn(3, ' ');
        let version = status.next().unwrap_or_default();
        if version != "HTTP/1.1" && version != "HTTP/1.0" {
            return Err("it does not speak HTTP/1.1".into());
        }
        let number = status.next().filter(|number| number.len() == 3).and_then(parse);
        let status =
            number.and_then(|number| u16::try_from(number).ok()).ok_or("its response has no status")?;
        let mut head = Self { status, closes: version == "HTTP/1.0", ..Self::default() };
        for line in lines {
            let (name, value) = line.split_once(':').ok_or("its response has a line that is no field")?;
            let value = value.trim();
            match name.to_ascii_lowercase().as_str() {
                "content-length" => {
                    let length = parse(value).ok_or("its response has a length that is none")?;
                    if head.length.is_some_and(|other| other != length) {
                        return Err("its response has two lengths".into());
                    }
                    head.length = Some(length);
                }
                "content-range" => {
                    head.range = Some(range(value).ok_or("its response has a range that is none")?)
                }
                "etag" => {
                    let strong = value.len() >= 2 && value.starts_with('"') && value.ends_with('"');
                    head.etag = strong.then(|| value.to_owned());
                }
                "last-modified" => head.modified = Some(value.to_owned()),
                "location" => head.location = Some(value.chars().take(200).collect()),
                "connection" => {
                    for word in value.split(',').map(|word| word.trim().to_ascii_lowercase()) {
                        match word.as_str() {
                            "close" => head.closes = true,
                            "keep-alive" => head.closes = false,
                            _ => {}
                        }
                    }
                }
                "transfer-encoding" | "content-encoding" => {
                    head.coded |= !value.eq_ignore_ascii_case("identity")
                }
                _ => {}
            }
        }
        Ok(Some((head, end + 4)))
    }

    /// By what the server tells versions of the image apart.
    #[must_use]
    pub fn validator(&self) -> Option<&str> {
        self.etag.as_deref().or(self.modified.as_deref())
    }
}

/// A number of digits only.
fn parse(text: &str) -> Option<u64> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

/// `bytes FIRST-LAST/LENGTH`; the length is never unknown for a file.
fn range(value: &str) -> Option<(u64, u64, u64)> {
    let (unit, rest) = value.split_once(' ')?;
    let (range, length) = rest.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last, length) = (parse(first)?, parse(last)?, parse(length)?);
    (unit.eq_ignore_ascii_case("bytes") && first <= last && last < length).then_some((first, last, length))
}
