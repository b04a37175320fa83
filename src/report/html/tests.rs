//! The page: nothing breaks out of it, nothing is fetched, and a real browser lays it out.

#![allow(clippy::print_stdout, reason = "tests say what they skip")]

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::tempdir;

use super::super::synthetic;
use super::*;

/// Desk and phone.
const WIDTHS: [u32; 2] = [1280, 390];
/// Enough for the whole page on a phone.
const HEIGHT: u32 = 5200;

#[test]
fn nothing_breaks_out_and_nothing_is_fetched() {
    let page = render(&synthetic::report());
    assert!(
        !page.contains("<script"),
        "no scripts, and none from a tensor name"
    );
    assert!(page.contains("&lt;script&gt;"));
    for fetching in ["http://", "https://", "src=", "url(", "@import", "<link"] {
        assert!(!page.contains(fetching), "{fetching}");
    }
    assert!(!page.contains('\u{1}'));
}

#[test]
fn every_plot_is_there() {
    let page = render(&synthetic::report());
    let titles = [
        "Drift per layer",
        "KL divergence per position",
        "Error per tensor type",
        "KL divergence by position",
        "Perplexity by position",
        "SSM state drift over time",
        "Expert sets that change",
    ];
    for title in titles {
        assert!(page.contains(&format!("<h3>{title}</h3>")), "{title}");
    }
    assert!(!page.contains("NaN") && !page.contains("inf\""));
}

#[test]
fn an_empty_report_is_a_page() {
    let page = render(&ValidationReport::new(Subject::default(), None));
    assert!(page.contains("every gate holds"));
    assert!(!page.contains("<svg"));
}

fn browser() -> Option<PathBuf> {
    let folders: Vec<_> = std::env::split_paths(&std::env::var_os("PATH")?).collect();
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let paths = names
        .iter()
        .flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    paths.into_iter().find(|path| path.is_file())
}

fn browse(browser: &Path, width: u32, args: &[String]) -> Vec<u8> {
    let profile = tempdir().unwrap();
    let output = Command::new(browser)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
        ])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("--window-size={width},{HEIGHT}"))
        .args(args)
        .output()
        .expect("the browser starts");
    output.stdout
}

/// A page that holds the report in a frame of the given width and measures it. (A headless window is never narrower
/// than 500 pixels, a frame may be.)
fn measuring(page: &Path, width: u32) -> String {
    format!(
        "<!doctype html><body style='margin:0'><iframe id=f width={width} height={HEIGHT} style='border:0' src='{}'></iframe>\
         <script>onload=()=>{{const d=f.contentDocument.documentElement;\
         document.title=['measured',d.clientWidth,d.scrollWidth,f.contentDocument.querySelectorAll('svg[role=img]').length].join(' ')}}\
         </script>",
        page.file_name().unwrap().to_string_lossy()
    )
}

#[test]
fn a_browser_lays_it_out() {
    let Some(browser) = browser() else {
        println!("skipped: neither chromium nor google-chrome is on PATH");
        return;
    };
    let folder = tempdir().unwrap();
    let page = folder.path().join("report.html");
    std::fs::write(&page, render(&synthetic::report())).unwrap();
    for width in WIDTHS {
        let frame = folder.path().join("frame.html");
        std::fs::write(&frame, measuring(&page, width)).unwrap();
        let url = format!("file://{}", frame.display());
        let local = "--allow-file-access-from-files".to_string();
        let dom = browse(
            &browser,
            width,
            &[local.clone(), "--dump-dom".into(), url.clone()],
        );
        let dom = String::from_utf8_lossy(&dom).into_owned();
        let measured = dom
            .split("<title>measured ")
            .nth(1)
            .and_then(|rest| rest.split('<').next());
        let measured: Vec<u32> = measured
            .unwrap_or_else(|| panic!("nothing was measured: {dom}"))
            .split(' ')
            .map(|number| number.parse().unwrap())
            .collect();
        assert_eq!(measured[0], width);
        assert!(measured[1] <= width, "{} of {width} pixels", measured[1]);
        assert!(measured[2] >= 7, "{} plots", measured[2]);

        let shot = folder.path().join(format!("{width}.png"));
        browse(
            &browser,
            width,
            &[local, format!("--screenshot={}", shot.display()), url],
        );
        let png = std::fs::read(&shot).expect("a screenshot was made");
        if let Some(keep) = std::env::var_os("NEMOCONV_SCREENSHOTS") {
            let keep = Path::new(&keep);
            std::fs::copy(&shot, keep.join(format!("report-{width}.png"))).unwrap();
            std::fs::copy(&page, keep.join("report.html")).unwrap();
        }
        assert_eq!(&png[1..4], b"PNG");
        // One colour compresses to a few kilobytes.
        assert!(png.len() > 40_000, "a blank page: {} bytes", png.len());
    }
}
