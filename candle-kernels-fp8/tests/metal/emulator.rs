//! A device whose kernels run on the host.

use candle_kernels_fp8::metal::{Binding, Launch, Library, Queue, Slice};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

/// What runs the kernels, and their names.
struct Program {
    path: PathBuf,
    kernels: Vec<String>,
}

/// Compiles it; none without a C++ compiler.
fn program() -> Option<&'static Program> {
    static PROGRAM: OnceLock<Option<Program>> = OnceLock::new();
    PROGRAM.get_or_init(build).as_ref()
}

fn build() -> Option<Program> {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/metal/emulator");
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("metal");
    fs::create_dir_all(&out).unwrap();
    let command = |args: &[&str], from: &Path| {
        Command::new(&compiler)
            .args(["-std=c++17", "-O2", "-march=native", "-ffp-contract=off"])
            // A pointer to what is no multiple of its type's size ends the process.
            .args(["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"])
            .args(["-fno-strict-aliasing", "-w", "-I"])
            .arg(&here)
            .args(args)
            .arg(from)
            .output()
    };
    let probe = out.join("probe.cpp");
    fs::write(&probe, "_Float16 half(float value) { return value; }\n").unwrap();
    let served = command(&["-fsyntax-only"], &probe).is_ok_and(|output| output.status.success());
    if !served || !cfg!(target_os = "linux") {
        crate::skip("the Metal kernels run on Linux, with a C++ compiler that has half precision");
        return None;
    }
    let compile = |args: &[&str], from: &Path| {
        let output = command(args, from).unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{}: {told}", from.display());
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let object = |from: &Path| {
        let to = from.with_extension("o");
        let to = out.join(to.file_name().unwrap());
        compile(&["-c", "-o", to.to_str().unwrap()], from);
        to
    };
    let of_library = |library: Library| {
        let path = out.join(format!("{library:?}.cpp"));
        let mut source = library.source().to_owned();
        fs::write(&path, &source).unwrap();
        let expanded = compile(&["-E", "-P"], &path);
        let mut kernels = Vec::new();
        for (i, part) in expanded.split("extern \"C\" void ").skip(1).enumerate() {
            let name = part.split('(').next().unwrap();
            writeln!(
                source,
                "static emulator::Known known_{i}(\"{name}\", {name});"
            )
            .unwrap();
            kernels.push(name.to_owned());
        }
        fs::write(&path, source).unwrap();
        (object(&path), kernels)
    };
    let (objects, kernels): (Vec<PathBuf>, Vec<Vec<String>>) = std::thread::scope(|scope| {
        let own = scope.spawn(|| (object(&here.join("emulator.cpp")), Vec::new()));
        let others = Library::ALL.map(|library| scope.spawn(move || of_library(library)));
        let all = others.into_iter().chain([own]);
        all.map(|object| object.join().expect("it compiles"))
            .collect()
    });
    let program = out.join("emulator");
    let mut link = Command::new(&compiler);
    let linked = link
        .args(&objects)
        .arg("-o")
        .arg(&program)
        .status()
        .unwrap();
    assert!(linked.success(), "the emulator does not link");
    Some(Program {
        path: program,
        kernels: kernels.concat(),
    })
}

/// Memory of the device.
#[derive(Debug)]
pub(crate) struct Memory {
    index: usize,
}

impl Memory {
    pub(crate) fn slice(&self) -> Slice<'_, Self> {
        Slice {
            buffer: self,
            offset: 0,
        }
    }
}

/// A device.
pub(crate) struct Emulator {
    process: RefCell<Child>,
    pipes: RefCell<(ChildStdin, ChildStdout)>,
    memory: RefCell<Vec<Vec<u8>>>,
    launched: RefCell<BTreeSet<&'static str>>,
}

impl Emulator {
    /// None, which is said, without a C++ compiler.
    pub(crate) fn get() -> Option<Self> {
        let mut process = Command::new(&program()?.path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the emulator starts");
        let pipes = (
            process.stdin.take().unwrap(),
            process.stdout.take().unwrap(),
        );
        Some(Self {
            process: RefCell::new(process),
            pipes: RefCell::new(pipes),
            memory: RefCell::default(),
            launched: RefCell::default(),
        })
    }

    /// Memory that holds these bytes, starting at a multiple of 16.
    pub(crate) fn upload(&self, bytes: &[u8]) -> Memory {
        let mut memory = self.memory.borrow_mut();
        memory.push(bytes.to_vec());
        Memory {
            index: memory.len() - 1,
        }
    }

    /// What memory holds.
    pub(crate) fn download(&self, memory: &Memory) -> Vec<u8> {
        self.memory.borrow()[memory.index].clone()
    }

    /// Forgets all memory.
    pub(crate) fn clear(&self) {
        self.memory.borrow_mut().clear();
    }

    /// That every kernel ran whose name starts so.
    pub(crate) fn assert_all_launched(&self, prefix: &str) {
        let (all, launched) = (&program().unwrap().kernels, self.launched.borrow());
        let all = || all.iter().filter(|name| name.starts_with(prefix));
        assert!(all().count() > 0, "no kernel is called {prefix}");
        for name in all() {
            assert!(launched.contains(&name[..]), "{name} was not launched");
        }
    }

    fn exchange(&self, request: &[u8], count: usize) -> io::Result<(String, Vec<Vec<u8>>)> {
        let (to, from) = &mut *self.pipes.borrow_mut();
        to.write_all(request)?;
        to.flush()?;
        let mut bytes = || -> io::Result<Vec<u8>> {
            let mut len = [0; 4];
            from.read_exact(&mut len)?;
            let mut bytes = vec![0; u32::from_le_bytes(len) as usize];
            from.read_exact(&mut bytes)?;
            Ok(bytes)
        };
        let error = String::from_utf8_lossy(&bytes()?).into_owned();
        let contents = (0..count).map(|_| bytes()).collect::<io::Result<_>>()?;
        Ok((error, contents))
    }
}

impl Queue for Emulator {
    type Buffer = Memory;
    type Error = String;

    fn launch(&self, launch: &Launch<'_, Memory>) -> Result<(), String> {
        let slices = launch.buffers.iter().map(|binding| match binding {
            Binding::Read(slice) | Binding::Write(slice) => slice,
        });
        let indices: BTreeSet<usize> = slices.clone().map(|slice| slice.buffer.index).collect();
        let written: BTreeSet<usize> = (launch.buffers.iter())
            .filter_map(|binding| match binding {
                Binding::Write(slice) => Some(slice.buffer.index),
                Binding::Read(_) => None,
            })
            .collect();
        let mut request = Vec::new();
        let number = |request: &mut Vec<u8>, number: usize| {
            request.extend(u32::try_from(number).unwrap().to_le_bytes());
        };
        let block = |request: &mut Vec<u8>, bytes: &[u8]| {
            number(request, bytes.len());
            request.extend(bytes);
        };
        block(&mut request, launch.kernel.as_bytes());
        let words = launch.words.iter().flat_map(|word| word.to_le_bytes());
        block(&mut request, &words.collect::<Vec<u8>>());
        let mut memory = self.memory.borrow_mut();
        number(&mut request, indices.len());
        for &index in &indices {
            block(&mut request, &memory[index]);
        }
        number(&mut request, launch.buffers.len());
        for slice in slices {
            let at = indices
                .iter()
                .position(|&index| index == slice.buffer.index);
            number(&mut request, at.unwrap());
            number(&mut request, slice.offset);
        }
        number(&mut request, launch.groups);
        number(&mut request, launch.threads);
        let kernel = launch.kernel;
        self.launched.borrow_mut().insert(kernel);
        match self.exchange(&request, indices.len()) {
            Ok((error, contents)) if error.is_empty() => {
                for (index, contents) in indices.into_iter().zip(contents) {
                    if !written.contains(&index) && memory[index] != contents {
                        return Err(format!("{kernel}: it writes what it should only read"));
                    }
                    memory[index] = contents;
                }
                Ok(())
            }
            Ok((error, _)) => Err(format!("{kernel}: {error}")),
            Err(_) => {
                let status = self.process.borrow_mut().wait();
                Err(format!(
                    "{kernel}: it left its memory, or read it at an odd place ({status:?})"
                ))
            }
        }
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.get_mut().kill();
        let _ = self.process.get_mut().wait();
    }
}
