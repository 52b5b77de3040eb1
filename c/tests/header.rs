//! include/crossfusion.h is what cbindgen makes of this crate; `CROSSFUSION_BLESS=1` writes it.

use std::path::Path;

/// Without the paragraphs on safety, which tell a Rust caller what goes without saying in C, and
/// without the brackets of its links.
fn without_safety(header: &str) -> String {
    let mut out = String::new();
    let mut skips = false;
    for line in header.lines() {
        skips = line == "// # Safety" || skips && line.starts_with("//");
        if !skips {
            out += line.trim_end();
            out.push('\n');
        }
    }
    let out = out.replace("[`", "`").replace("`]", "`");
    out.replace("\n//\ncf_status", "\ncf_status").replace("\n//\nvoid", "\nvoid")
}

#[test]
fn the_header_is_current() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(here.join("cbindgen.toml")).unwrap();
    let bindings = cbindgen::Builder::new().with_crate(here).with_config(config).generate().unwrap();
    let mut header = Vec::new();
    bindings.write(&mut header);
    let header = without_safety(&String::from_utf8(header).unwrap());
    let path = here.join("../include/crossfusion.h");
    if std::env::var_os("CROSSFUSION_BLESS").is_some() {
        std::fs::write(&path, &header).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == header, "include/crossfusion.h is not what c/src says: run this with CROSSFUSION_BLESS=1");
}
