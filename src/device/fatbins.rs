//! The kernels as compiled by build.rs.

/// GPU code of kernels/*.cu: ("layer_norm_f32", a fatbin) for each file and storage type; nothing
/// if there was no nvcc.
pub const fn fatbins() -> &'static [(&'static str, &'static [u8])] {
    include!(concat!(env!("OUT_DIR"), "/fatbins.rs"))
}

/// The version of the nvcc that compiled them; `None`: this build has no GPU kernels.
pub const NVCC: Option<&str> = option_env!("CROSSFUSION_NVCC");

#[cfg(test)]
mod tests {
    use super::*;

    /// The magic number of <fatbinary_section.h>, and code for both storage types.
    #[test]
    fn every_source_is_there_if_nvcc_was() {
        let sources = std::fs::read_dir("kernels").unwrap().map(|e| e.unwrap().path());
        let sources = sources.filter(|p| p.extension().is_some_and(|e| e == "cu"));
        let names: Vec<_> = sources.map(|p| p.file_stem().unwrap().to_str().unwrap().to_string()).collect();
        assert_eq!(fatbins().len(), if NVCC.is_some() { 2 * names.len() } else { 0 });
        for (name, bytes) in fatbins() {
            let file = name.strip_suffix("_f32").or(name.strip_suffix("_bf16")).unwrap();
            assert!(names.iter().any(|n| n == file), "{name}");
            assert_eq!(bytes[..4], 0xba55_ed50_u32.to_le_bytes(), "{name}");
        }
    }
}
