//! How much memory a run may take.

/// Share of what the machine has free that is taken without `--max-ram`, in quarters.
const QUARTERS: u64 = 3;

/// `--max-ram`, or three quarters of the memory that is free when the run begins; where that is not known, no limit.
pub fn limit(max_ram: Option<u64>) -> u64 {
    let free = || Some(free_bytes()? / 4 * QUARTERS);
    max_ram.or_else(free).unwrap_or(u64::MAX)
}

/// Gives memory back as soon as it is free: for work that holds little, and whose buffers are larger than what it computes.
pub fn return_at_once() {
    /// `mi_option_purge_delay`, milliseconds. Source: mimalloc 2 and 3, `mimalloc.h`.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    // SAFETY: an option that may be changed at any time; it is an atomic value of the allocator.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, 0) };
}

/// What Linux says is available, or what the control group is allowed if that is less.
fn free_bytes() -> Option<u64> {
    let read = |path| std::fs::read_to_string(path).ok();
    let available = available_of(&read("/proc/meminfo")?)?;
    let allowed = read("/sys/fs/cgroup/memory.max").and_then(|text| text.trim().parse().ok());
    Some(available.min(allowed.unwrap_or(u64::MAX)))
}

fn available_of(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_counts_and_what_is_free_is_read() {
        assert_eq!(limit(Some(7)), 7);
        let meminfo = "MemTotal:       65 kB\nMemAvailable:   12 kB\nCached: 3 kB\n";
        assert_eq!(available_of(meminfo), Some(12 << 10));
        assert_eq!(available_of("MemTotal: 65 kB"), None);
    }
}
