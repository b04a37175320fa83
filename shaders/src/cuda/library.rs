//! Where NVIDIA's libraries are: an own list of names, as the bindings know those of one major version only.

use std::ffi::OsString;
use std::path::PathBuf;

/// Names that the loader looks for, then places of toolkits that it does not know.
pub fn candidates(names: &[&str]) -> Vec<OsString> {
    let homes = ["CUDA_HOME", "CUDA_PATH"].map(std::env::var_os);
    let mut homes: Vec<PathBuf> = homes.into_iter().flatten().map(PathBuf::from).collect();
    homes.push(PathBuf::from("/usr/local/cuda"));
    let mut all: Vec<OsString> = names.iter().map(OsString::from).collect();
    for home in homes {
        for folder in ["lib64", "bin"] {
            all.extend(
                names
                    .iter()
                    .map(|name| home.join(folder).join(name).into_os_string()),
            );
        }
    }
    all
}
