import Foundation
import MLX

struct Failure: Error, CustomStringConvertible {
    let description: String
}

func dtype(_ name: String) throws -> DType {
    guard let found = DType.allCases.first(where: { "\($0)" == name }) else {
        throw Failure(description: "dtype \(name) is not known")
    }
    return found
}

func integers(_ values: [Int32], _ shape: [Int]) -> MLXArray {
    MLXArray(values, shape)
}

/// One text, and the model that goes on with it.
final class Text {
    let manifest: Manifest
    private(set) var rows = 0  // tokens that the buffers hold: all of the text but the last

    private let folder: URL
    private let onGPU: Bool  // functions run where they were exported for
    private let weights: [MLXArray]
    private var state: [MLXArray] = []
    private var size = 0  // of the buffers, among the capacities
    private var loaded: [String: ([MLXArray]) -> [MLXArray]] = [:]

    init(folder: URL) throws {
        self.folder = folder
        let file = try Data(contentsOf: folder.appendingPathComponent("manifest.json"))
        manifest = try JSONDecoder().decode(Manifest.self, from: file)
        onGPU = manifest.device == "gpu"
        let arrays = try loadArrays(url: folder.appendingPathComponent(manifest.weights.file))
        weights = try manifest.weights.arrays.map { each in
            guard let array = arrays[each.name] else { throw Failure(description: "there is no \(each.name)") }
            return array
        }
        eval(weights)
    }

    func function(_ name: String) throws -> Manifest.Function {
        guard let found = manifest.functions.first(where: { $0.name == name }) else {
            throw Failure(description: "the manifest has no function \(name)")
        }
        return found
    }

    func readPrompt(_ prompt: [Int32]) throws {
        state = try manifest.state.map { try zeros($0.shapes[0], dtype: dtype($0.dtype)) }
        state[0] = integers([prompt[0]], [1])  // the last token of the text as yet
        var at = 1
        while at < prompt.count {
            let chunks = manifest.functions.filter { $0.kind == "prefill" }
            // The largest that is full, or the smallest, which comes first.
            let chunk = chunks.last { $0.tokens! <= prompt.count - at } ?? chunks[0]
            let size = chunk.tokens!, count = min(size, prompt.count - at)
            let tokens = Array(prompt[at ..< at + count]) + Array(repeating: 0, count: size - count)
            _ = try call(chunk, [integers(tokens, [1, size]), integers([Int32(count)], [1])])
            at += count
            rows += count
        }
    }

    /// A step: the tokens that it says.
    func step(_ function: Manifest.Function, _ sampling: [MLXArray]) throws -> [Int32] {
        let found = try call(function, sampling)
        let count = found[1].asArray(Int32.self)[0]
        rows += Int(count)
        return Array(found[0].asArray(Int32.self).prefix(Int(count)))
    }

    /// What a function gives besides the state, which goes on.
    private func call(_ function: Manifest.Function, _ inputs: [MLXArray]) throws -> [MLXArray] {
        while rows + function.room > manifest.capacities[size] { size += 1 }
        let run = try load(function.files[size])
        var inputs = inputs
        for (buffer, told) in zip(state, manifest.state) { inputs.append(grown(buffer, told.shapes[size])) }
        state = []
        inputs += weights
        let found = try withError { run(inputs) }
        inputs = []  // nobody but the graph holds the buffers now, so that they are written to in place
        try withError { eval(found) }
        let end = function.outputs.count
        state = Array(found[end...])
        return Array(found[..<end])
    }

    private func load(_ file: String) throws -> ([MLXArray]) -> [MLXArray] {
        if let run = loaded[file] { return run }
        let imported = try ImportedGraph(path: folder.appendingPathComponent(file).path)
        var run: ([MLXArray]) -> [MLXArray] = { imported($0) }
        if onGPU { run = compile(run) }  // which joins small kernels to larger ones
        loaded[file] = run
        return run
    }

    private func grown(_ buffer: MLXArray, _ shape: [Int]) -> MLXArray {
        let missing = zip(shape, buffer.shape).map { IntOrPair((0, $0 - $1)) }
        return buffer.shape == shape ? buffer : padded(buffer, widths: missing)
    }
}
