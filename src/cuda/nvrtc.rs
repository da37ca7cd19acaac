//! NVRTC, the run-time compiler: found where toolkits and Python wheels put it, loaded without ever panicking.

use super::source::Unit;
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

/// Names the library, or the folder it lies in.
pub const LIBRARY_VARIABLE: &str = "HONE_NVRTC";

/// Newest first.
const NAMES: [&str; 6] =
    ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", "nvrtc64_130_0.dll", "nvrtc64_120_0.dll", "libnvrtc.so.11.2"];

type Program = *mut c_void;
type Status = c_int;

/// The functions of the library that are used.
struct Api {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    destroy: unsafe extern "C" fn(*mut Program) -> Status,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    log: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    ptx_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    ptx: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    architecture_count: unsafe extern "C" fn(*mut c_int) -> Status,
    architectures: unsafe extern "C" fn(*mut c_int) -> Status,
}

/// A loaded compiler.
pub struct Nvrtc {
    api: Api,
    path: PathBuf,
    version: (i32, i32),
    /// Compute capabilities it compiles for, as 90 for 9.0.
    architectures: Vec<u32>,
    /// What `api` points into.
    _library: Library,
    /// What the compiler loads by name at its first use, which fails unless it is loaded already.
    _builtins: Option<Library>,
}

/// A compiled source file.
pub struct Compiled {
    /// A cubin, or PTX if the compiler does not know the card.
    pub image: Vec<u8>,
    /// What the compiler had to say, registers and spills of each kernel included.
    pub log: String,
}

impl Nvrtc {
    /// Loads the first one that works, or says where was looked.
    pub fn find() -> Result<Nvrtc, String> {
        if let Some(given) = std::env::var_os(LIBRARY_VARIABLE).filter(|v| !v.is_empty()) {
            let given = PathBuf::from(given);
            let candidates =
                if given.is_dir() { NAMES.iter().map(|name| given.join(name)).collect() } else { vec![given.clone()] };
            let mut reason = format!("no {} in it", NAMES[0]);
            for candidate in candidates.iter().filter(|path| path.exists()) {
                match Self::load(candidate) {
                    Ok(found) => return Ok(found),
                    Err(e) => reason = e,
                }
            }
            return Err(format!("${LIBRARY_VARIABLE} is {}: {reason}", given.display()));
        }
        let installed = folders().into_iter().flat_map(|folder| NAMES.map(|name| folder.join(name)));
        let candidates = NAMES.iter().map(PathBuf::from).chain(installed.filter(|path| path.exists()));
        let mut reason = None;
        for candidate in candidates {
            match Self::load(&candidate) {
                Ok(found) => return Ok(found),
                Err(e) if candidate.is_absolute() => reason = Some(format!("{}: {e}", candidate.display())),
                Err(_) => {}
            }
        }
        let hint = format!("install it with: pip install nvidia-cuda-nvrtc, or set ${LIBRARY_VARIABLE} to libnvrtc");
        Err(match reason {
            Some(reason) => format!("NVRTC does not load ({reason}); {hint}"),
            None => format!("NVRTC was not found; {hint}"),
        })
    }

    fn load(path: &Path) -> Result<Nvrtc, String> {
        let builtins = path.parent().and_then(load_builtins);
        // SAFETY: NVRTC's initialisers have no requirements.
        let library = unsafe { Library::new(path) }.map_err(|e| e.to_string())?;
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: the signatures above are those of nvrtc.h, unchanged since CUDA 11.2.
                *unsafe { library.get($name) }.map_err(|e| e.to_string())?
            };
        }
        let api = Api {
            version: symbol!("nvrtcVersion"),
            error_string: symbol!("nvrtcGetErrorString"),
            create: symbol!("nvrtcCreateProgram"),
            destroy: symbol!("nvrtcDestroyProgram"),
            compile: symbol!("nvrtcCompileProgram"),
            log_size: symbol!("nvrtcGetProgramLogSize"),
            log: symbol!("nvrtcGetProgramLog"),
            cubin_size: symbol!("nvrtcGetCUBINSize"),
            cubin: symbol!("nvrtcGetCUBIN"),
            ptx_size: symbol!("nvrtcGetPTXSize"),
            ptx: symbol!("nvrtcGetPTX"),
            architecture_count: symbol!("nvrtcGetNumSupportedArchs"),
            architectures: symbol!("nvrtcGetSupportedArchs"),
        };
        let (mut major, mut minor, mut count) = (0, 0, 0);
        // SAFETY: the pointers are to integers that live through the calls; the array has the length the library asks for.
        let architectures = unsafe {
            (api.version)(&mut major, &mut minor);
            (api.architecture_count)(&mut count);
            let mut list = vec![0; count.max(0) as usize];
            (api.architectures)(list.as_mut_ptr());
            list.into_iter().map(|a| a as u32).collect()
        };
        let (version, path) = ((major, minor), path.to_path_buf());
        Ok(Nvrtc { api, path, version, architectures, _library: library, _builtins: builtins })
    }

    /// "NVRTC 13.0 (libnvrtc.so.13)".
    pub fn describe(&self) -> String {
        format!("NVRTC {}.{} ({})", self.version.0, self.version.1, self.path.display())
    }

    /// What a compiled file depends on besides source and target.
    pub fn version(&self) -> String {
        format!("nvrtc {}.{}", self.version.0, self.version.1)
    }

    /// The target for a card of this compute capability: its own machine code, else PTX of the newest older one, which the
    /// driver compiles.
    pub fn target(&self, (major, minor): (u32, u32)) -> Result<String, String> {
        let card = major * 10 + minor;
        match self.architectures.iter().copied().filter(|&a| a <= card).max() {
            Some(best) if best == card => Ok(format!("sm_{best}")),
            Some(best) => Ok(format!("compute_{best}")),
            None => Err(format!(
                "{} does not compile for compute capability {major}.{minor}; install an older one",
                self.describe()
            )),
        }
    }

    /// Compiles a source file for a target such as "sm_90" or "compute_90".
    pub fn compile(&self, unit: Unit, target: &str) -> Result<Compiled, String> {
        let source = CString::new(unit.expand()).map_err(|e| e.to_string())?;
        let name = CString::new(unit.name()).map_err(|e| e.to_string())?;
        let mut options = vec![format!("--gpu-architecture={target}"), "--std=c++17".to_string()];
        if target.starts_with("sm_") {
            options.push("--ptxas-options=-v".to_string());
        }
        let options: Vec<CString> = options.into_iter().filter_map(|o| CString::new(o).ok()).collect();
        let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let mut program: Program = std::ptr::null_mut();
        let none = std::ptr::null();
        // SAFETY: every pointer is to a live, zero-terminated string or to an array of the length that goes with it.
        let status = unsafe {
            let status = (self.api.create)(&mut program, source.as_ptr(), name.as_ptr(), 0, none, none);
            match status {
                0 => (self.api.compile)(program, pointers.len() as c_int, pointers.as_ptr()),
                failed => failed,
            }
        };
        if program.is_null() {
            return Err(self.error(status));
        }
        let read = |size: unsafe extern "C" fn(Program, *mut usize) -> Status,
                    get: unsafe extern "C" fn(Program, *mut c_char) -> Status| {
            let mut bytes = 0;
            // SAFETY: `program` lives until `destroy` below; the buffer has the size the library asks for.
            unsafe {
                if size(program, &mut bytes) != 0 {
                    return Vec::new();
                }
                let mut buffer = vec![0u8; bytes];
                get(program, buffer.as_mut_ptr().cast());
                buffer
            }
        };
        let log = String::from_utf8_lossy(&read(self.api.log_size, self.api.log)).trim_end_matches('\0').to_string();
        let image = match target.starts_with("sm_") {
            true => read(self.api.cubin_size, self.api.cubin),
            false => read(self.api.ptx_size, self.api.ptx),
        };
        // SAFETY: made by `create`, used no more.
        unsafe { (self.api.destroy)(&mut program) };
        match status {
            0 if !image.is_empty() => Ok(Compiled { image, log }),
            _ => Err(format!("{} for {target}: {}: {}", unit.name(), self.error(status), log.trim())),
        }
    }

    fn error(&self, status: Status) -> String {
        // SAFETY: the library returns a static string for any number.
        let text = unsafe { CStr::from_ptr((self.api.error_string)(status)) };
        text.to_string_lossy().into_owned()
    }
}

/// Loads `libnvrtc-builtins` beside the compiler, which looks for it on the search path alone.
fn load_builtins(folder: &Path) -> Option<Library> {
    let mut names: Vec<PathBuf> = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).collect();
    names.retain(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("libnvrtc-builtins.so") && !name.contains(".alt.")
    });
    names.sort();
    // SAFETY: the library holds data and has no initialisers of note.
    names.iter().find_map(|path| unsafe { Library::new(path) }.ok())
}

/// Where toolkits and the wheels of PyPI put the library.
fn folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    let roots = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let toolkits = children(Path::new("/usr/local")).filter(|p| file_name(p).starts_with("cuda"));
    for root in roots.chain(toolkits) {
        folders.extend(["lib64", "lib", "targets/x86_64-linux/lib", "bin"].map(|sub| root.join(sub)));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let prefixes = std::env::split_paths(&path).filter_map(|bin| bin.parent().map(Path::to_path_buf));
    let named = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".local"));
    for prefix in named.chain(prefixes).chain(home) {
        folders.push(prefix.join("lib"));
        for python in children(&prefix.join("lib")).filter(|p| file_name(p).starts_with("python3")) {
            for packages in ["site-packages", "dist-packages"] {
                folders.extend(children(&python.join(packages).join("nvidia")).map(|package| package.join("lib")));
            }
        }
    }
    folders
}

fn children(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
    // The newest first, as far as names tell.
    paths.sort_by(|a, b| b.cmp(a));
    paths.into_iter()
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
