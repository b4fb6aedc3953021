//! Numbers as people read them: with units, and a few digits.

/// A size in memory or on disk: `512 B`, `3.2 MiB`, `14.9 GiB`. Powers of 1024.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // 1023.96 KiB would be printed as 1024.0 KiB.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A rate of tokens: `3.25 tokens/s`, `87.4 tokens/s`, `1520 tokens/s`.
pub fn tokens_per_second(rate: f64) -> String {
    format!("{} tokens/s", significant(rate))
}

/// A rate of bytes, given in bytes a second: `23.1 GB/s`. Powers of 1000, as memory bandwidth is quoted.
pub fn gigabytes_per_second(rate: f64) -> String {
    format!("{} GB/s", significant(rate / 1e9))
}

/// A whole number with its thousands apart: `1,234,567`.
pub fn count(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 token`, `2 tokens`.
pub fn plural(number: usize, noun: &str) -> String {
    match number {
        1 => format!("1 {noun}"),
        _ => format!("{} {noun}s", count(number)),
    }
}

/// Three digits or all whole ones: `0.042`, `3.25`, `87.4`, `1520`.
pub fn significant(value: f64) -> String {
    match value.abs() {
        size if size >= 99.95 || !size.is_finite() => format!("{value:.0}"),
        size if size >= 9.995 => format!("{value:.1}"),
        size if size >= 0.9995 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (size, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1024 * 1024 - 1, "1.0 MiB"),
            (3_355_443, "3.2 MiB"),
            (16_060_522_496, "15.0 GiB"),
            (u64::MAX, "16777216.0 TiB"),
        ] {
            assert_eq!(bytes(size), text);
        }
    }

    #[test]
    fn rates() {
        for (rate, text) in [
            (0.0, "0.00"),
            (0.0421, "0.042"),
            (3.249, "3.25"),
            (9.996, "10.0"),
            (87.44, "87.4"),
            (99.96, "100"),
            (1520.4, "1520"),
        ] {
            assert_eq!(significant(rate), text);
        }
        assert_eq!(tokens_per_second(12.0), "12.0 tokens/s");
        assert_eq!(gigabytes_per_second(23.05e9), "23.1 GB/s");
    }

    #[test]
    fn counts() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1_000), "1,000");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(plural(1, "token"), "1 token");
        assert_eq!(plural(2048, "token"), "2,048 tokens");
    }
}
